// Streams, events and graphs. Work of a stream runs at once, or, with SIM_LATE=1, as late as CUDA allows:
// when something waits for it, and then nothing but what that needs. So a missing event, a pinned buffer that
// is reused too early, or a result that is read before a synchronisation, shows in one of the two modes.
#include <algorithm>
#include <chrono>
#include <deque>
#include <map>
#include <mutex>
#include <vector>
#include "runtime.h"

namespace sim {

using Clock = std::chrono::steady_clock;

// The first `count` pieces of work of a stream.
struct Mark {
    std::shared_ptr<Stream> stream;
    uint64_t count = 0;
};

struct Node {
    const char* name;
    std::function<void()> run;
    std::vector<size_t> after;  // nodes that must have run
};

struct Graph {
    std::vector<Node> nodes;
};

struct Capture {
    std::shared_ptr<Graph> graph = std::make_shared<Graph>();
    Stream* origin = nullptr;
    bool invalid = false;
};

struct Stream {
    struct Work {
        std::function<void()> run;
        std::vector<Mark> after;
    };
    bool blocking = true;  // waits for the legacy default stream, and that one for it
    std::deque<Work> queue;
    std::vector<Mark> waits;  // for the next piece of work
    uint64_t issued = 0, done = 0;
    std::shared_ptr<Capture> capture;
    std::vector<size_t> frontier;  // nodes that the next captured one comes after
};

struct Event {
    bool timing = true;
    Mark mark;                 // of the last record; no stream: never recorded
    Clock::time_point time{};  // when the last record ran
    std::shared_ptr<Capture> capture;
    std::vector<size_t> frontier;
};

struct GraphExec {
    std::shared_ptr<const Graph> graph;
    uint64_t launches = 0;
};

namespace {

struct Device {
    std::recursive_mutex mutex;  // streams run in the calling thread, one at a time
    std::map<Stream*, std::shared_ptr<Stream>> streams;
    std::shared_ptr<Stream> legacy = std::make_shared<Stream>();
    int captures = 0;
};

Device& device() {
    static Device* instance = new Device;
    return *instance;
}

std::shared_ptr<Stream> find(cudaStream_t stream) {
    Device& d = device();
    if (!stream) return d.legacy;
    const auto it = d.streams.find(stream);
    return it == d.streams.end() ? nullptr : it->second;
}

void run_until(Stream& s, uint64_t count) {
    while (s.done < count) {
        Stream::Work work = std::move(s.queue.front());
        s.queue.pop_front();
        for (const Mark& m : work.after) run_until(*m.stream, m.count);
        work.run();
        s.done++;
    }
}

// What the default stream's rule adds: it waits for all blocking streams, and they for it.
void wait_for_legacy(const std::shared_ptr<Stream>& s) {
    Device& d = device();
    if (s == d.legacy) {
        for (const auto& [handle, other] : d.streams)
            if (other->blocking) s->waits.push_back({other, other->issued});
    } else if (s->blocking) {
        s->waits.push_back({d.legacy, d.legacy->issued});
    }
}

cudaError_t capture_node(Stream& s, const char* name, std::function<void()> run) {
    if (s.capture->invalid) return set_error(cudaErrorStreamCaptureInvalidated);
    std::vector<Node>& nodes = s.capture->graph->nodes;
    nodes.push_back({name, std::move(run), s.frontier});
    s.frontier = {nodes.size() - 1};
    return cudaSuccess;
}

cudaError_t invalidate(Stream& s) {
    s.capture->invalid = true;
    return set_error(cudaErrorStreamCaptureUnsupported);
}

// An order of the nodes that their dependencies allow: as captured, or late or shuffled, another.
std::vector<size_t> order_of(const Graph& graph, uint64_t seed) {
    const size_t n = graph.nodes.size();
    std::vector<size_t> order;
    std::vector<char> ran(n, 0);
    while (order.size() < n) {
        std::vector<size_t> ready;
        for (size_t i = 0; i < n; i++) {
            const std::vector<size_t>& after = graph.nodes[i].after;
            if (!ran[i] && std::all_of(after.begin(), after.end(), [&](size_t k) { return ran[k] != 0; }))
                ready.push_back(i);
        }
        size_t pick = 0;
        if (settings().shuffle) pick = (seed = seed * 6364136223846793005ull + 1442695040888963407ull) >> 33;
        else if (settings().late) pick = ready.size() - 1;
        order.push_back(ready[pick % ready.size()]);
        ran[order.back()] = 1;
    }
    return order;
}

}  // namespace

bool is_capturing() { return device().captures > 0; }

void run_all_streams() {
    Device& d = device();
    std::lock_guard lock(d.mutex);
    for (const auto& [handle, s] : d.streams) run_until(*s, s->issued);
    run_until(*d.legacy, d.legacy->issued);
}

cudaError_t synchronize(cudaStream_t stream) {
    std::lock_guard lock(device().mutex);
    const auto s = find(stream);
    if (!s) return set_error(cudaErrorInvalidResourceHandle);
    if (s->capture) return invalidate(*s);
    run_until(*s, s->issued);
    return cudaSuccess;
}

cudaError_t enqueue(cudaStream_t stream, const char* name, std::function<void()> work) {
    std::lock_guard lock(device().mutex);
    const auto s = find(stream);
    if (!s) return set_error(cudaErrorInvalidResourceHandle);
    if (s->capture) return capture_node(*s, name, std::move(work));
    if (s == device().legacy && is_capturing()) return set_error(cudaErrorStreamCaptureImplicit);
    wait_for_legacy(s);
    s->queue.push_back({std::move(work), std::move(s->waits)});
    s->waits.clear();
    s->issued++;
    if (!settings().late) run_until(*s, s->issued);
    return cudaSuccess;
}

}  // namespace sim

using namespace sim;

// ---- streams ----------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    if (flags > cudaStreamNonBlocking) return set_error(cudaErrorInvalidValue);
    std::lock_guard lock(device().mutex);
    auto s = std::make_shared<Stream>();
    s->blocking = !(flags & cudaStreamNonBlocking);
    *stream = s.get();
    device().streams.emplace(s.get(), s);
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    std::lock_guard lock(device().mutex);
    const auto s = find(stream);
    if (!stream || !s) return set_error(cudaErrorInvalidResourceHandle);
    if (s->capture) return invalidate(*s);
    run_until(*s, s->issued);
    device().streams.erase(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return synchronize(stream); }

// Late, a query lets one piece of work run, so that a loop of queries ends.
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    std::lock_guard lock(device().mutex);
    const auto s = find(stream);
    if (!s) return set_error(cudaErrorInvalidResourceHandle);
    if (s->capture) return invalidate(*s);
    if (s->done == s->issued) return cudaSuccess;
    run_until(*s, s->done + 1);
    return cudaErrorNotReady;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    std::lock_guard lock(device().mutex);
    const auto s = find(stream);
    if (!s || !event) return set_error(cudaErrorInvalidResourceHandle);
    if (event->capture) {
        if (!s->capture) {  // joins the capture
            s->capture = event->capture;
            s->frontier.clear();
        } else if (s->capture != event->capture) {
            return set_error(cudaErrorStreamCaptureIsolation);
        }
        s->frontier.insert(s->frontier.end(), event->frontier.begin(), event->frontier.end());
        return cudaSuccess;
    }
    if (s->capture) {
        s->capture->invalid = true;
        return set_error(cudaErrorStreamCaptureIsolation);
    }
    if (event->mark.stream && event->mark.stream != s) s->waits.push_back(event->mark);
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
    if (is_capturing()) return set_error(cudaErrorStreamCaptureUnsupported);
    run_all_streams();
    return cudaSuccess;
}

// ---- events -----------------------------------------------------------------------------------------------

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    *event = new Event;
    (*event)->timing = !(flags & cudaEventDisableTiming);
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    if (!event) return set_error(cudaErrorInvalidResourceHandle);
    std::lock_guard lock(device().mutex);
    if (const auto s = event->mark.stream)
        run_until(*s, std::max(s->done, event->mark.count));  // it still writes the time
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    std::lock_guard lock(device().mutex);
    const auto s = find(stream);
    if (!s || !event) return set_error(cudaErrorInvalidResourceHandle);
    if (s->capture) {
        event->capture = s->capture;
        event->frontier = s->frontier;
        event->mark = {};
        return cudaSuccess;
    }
    event->capture.reset();
    if (const cudaError_t error = enqueue(stream, "event", [event] { event->time = Clock::now(); }))
        return error;
    event->mark = {s, s->issued};
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (!event) return set_error(cudaErrorInvalidResourceHandle);
    std::lock_guard lock(device().mutex);
    if (event->capture) return set_error(cudaErrorCapturedEvent);
    if (event->mark.stream) run_until(*event->mark.stream, event->mark.count);
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (!event) return set_error(cudaErrorInvalidResourceHandle);
    std::lock_guard lock(device().mutex);
    if (event->capture) return set_error(cudaErrorCapturedEvent);
    const auto& s = event->mark.stream;
    if (!s || s->done >= event->mark.count) return cudaSuccess;
    run_until(*s, s->done + 1);
    return cudaErrorNotReady;
}

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
    if (!start || !end || !start->timing || !end->timing || !start->mark.stream || !end->mark.stream)
        return set_error(cudaErrorInvalidResourceHandle);
    std::lock_guard lock(device().mutex);
    for (const Event* e : {start, end})
        if (e->mark.stream->done < e->mark.count) return set_error(cudaErrorNotReady);
    *ms = std::chrono::duration<float, std::milli>(end->time - start->time).count();
    return cudaSuccess;
}

// ---- graphs -----------------------------------------------------------------------------------------------

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    std::lock_guard lock(device().mutex);
    const auto s = find(stream);
    if (!s) return set_error(cudaErrorInvalidResourceHandle);
    if (!stream || s->capture) return set_error(cudaErrorStreamCaptureUnsupported);
    s->capture = std::make_shared<Capture>();
    s->capture->origin = stream;
    s->frontier.clear();
    device().captures++;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    std::lock_guard lock(device().mutex);
    *graph = nullptr;
    const auto s = find(stream);
    if (!s || !s->capture || s->capture->origin != stream) return set_error(cudaErrorStreamCaptureUnmatched);
    const std::shared_ptr<Capture> capture = s->capture;
    const Graph& g = *capture->graph;
    // Every node must come before where the origin stands: else a fork was not joined.
    std::vector<char> before(g.nodes.size(), 0);
    std::vector<size_t> todo = s->frontier;
    while (!todo.empty()) {
        const size_t i = todo.back();
        todo.pop_back();
        if (before[i]) continue;
        before[i] = 1;
        todo.insert(todo.end(), g.nodes[i].after.begin(), g.nodes[i].after.end());
    }
    for (const auto& [handle, other] : device().streams) {
        if (other->capture != capture) continue;
        other->capture.reset();
        other->frontier.clear();
    }
    device().captures--;
    if (capture->invalid) return set_error(cudaErrorStreamCaptureInvalidated);
    if (std::count(before.begin(), before.end(), 0)) return set_error(cudaErrorStreamCaptureUnjoined);
    *graph = new Graph(g);
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    std::lock_guard lock(device().mutex);
    const auto s = find(stream);
    if (!s) return set_error(cudaErrorInvalidResourceHandle);
    *status = !s->capture           ? cudaStreamCaptureStatusNone
              : s->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                    : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
    if (!graph) return set_error(cudaErrorInvalidValue);
    *exec = new GraphExec{std::make_shared<const Graph>(*graph)};
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    if (!exec) return set_error(cudaErrorInvalidValue);
    const uint64_t seed = settings().seed + ++exec->launches;
    return enqueue(stream, "graph", [graph = exec->graph, seed] {
        for (const size_t i : order_of(*graph, seed)) graph->nodes[i].run();
    });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    delete exec;
    return cudaSuccess;
}
