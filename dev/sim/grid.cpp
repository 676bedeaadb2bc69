// Blocks over cores. Which core runs a block, and when, changes nothing that a correct kernel can see.
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>
#include <vector>
#include "runtime.h"

namespace sim {
namespace {

// Threads that wait for a job, which is f(0) .. f(n - 1), taken in chunks. The caller works too.
class Pool {
  public:
    explicit Pool(int threads) {
        for (int i = 1; i < threads; i++) threads_.emplace_back([this] { serve(); });
    }
    ~Pool() {
        {
            std::lock_guard lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (std::thread& t : threads_) t.join();
    }
    void run(size_t n, const std::function<void(size_t)>& f) {
        if (threads_.empty() || n < 2) {
            for (size_t i = 0; i < n; i++) f(i);
            return;
        }
        auto job = std::make_shared<Job>();
        job->f = &f;
        job->n = n;
        job->chunk = std::max<size_t>(1, n / (8 * (threads_.size() + 1)));
        {
            std::lock_guard lock(mutex_);
            job_ = job;
            jobs_++;
        }
        wake_.notify_all();
        work(*job);
        std::unique_lock lock(mutex_);
        done_.wait(lock, [&] { return job->done == n; });
        job_.reset();
    }

  private:
    struct Job {
        const std::function<void(size_t)>* f;
        size_t n, chunk;
        std::atomic<size_t> next{0}, done{0};
    };
    void work(Job& job) {
        for (;;) {
            const size_t begin = job.next.fetch_add(job.chunk);
            if (begin >= job.n) return;
            const size_t end = std::min(job.n, begin + job.chunk);
            for (size_t i = begin; i < end; i++) (*job.f)(i);
            if (job.done.fetch_add(end - begin) + (end - begin) == job.n) {
                std::lock_guard lock(mutex_);
                done_.notify_all();
            }
        }
    }
    void serve() {
        uint64_t seen = 0;
        for (;;) {
            std::shared_ptr<Job> job;
            {
                std::unique_lock lock(mutex_);
                wake_.wait(lock, [&] { return stopping_ || jobs_ != seen; });
                if (stopping_) return;
                seen = jobs_;
                job = job_;
            }
            if (job) work(*job);
        }
    }
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::shared_ptr<Job> job_;
    uint64_t jobs_ = 0;
    bool stopping_ = false;
    std::vector<std::thread> threads_;
};

Pool& pool() {
    static Pool* instance = new Pool(settings().threads);  // never ends: nobody waits for its threads at exit
    return *instance;
}

// A bijection of 0 .. n - 1 that looks like none: i -> a i + c mod n.
struct Permutation {
    uint64_t n, a = 1, c = 0;
    Permutation(uint64_t n_, uint64_t seed) : n(n_) {
        a = (seed * 0x9e3779b97f4a7c15ull >> 7) % n | 1;
        while (std::gcd(a, n) != 1) a++;
        c = seed * 0xbf58476d1ce4e5b9ull % n;
    }
    uint64_t operator()(uint64_t i) const {
        return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * i + c) % n);
    }
};

}  // namespace

void parallel_for(size_t n, const std::function<void(size_t)>& f) { pool().run(n, f); }

void run_grid(const Launch& launch) {
    const size_t blocks = size_t{launch.grid.x} * launch.grid.y * launch.grid.z;
    const size_t threads = size_t{launch.block.x} * launch.block.y * launch.block.z;
    const bool shuffle = settings().shuffle;
    const Permutation order(blocks, settings().seed + launch.number);
    auto run = [&](size_t i) {
        if (shuffle) i = order(i);
        run_block(launch, {static_cast<unsigned>(i % launch.grid.x),
                           static_cast<unsigned>(i / launch.grid.x % launch.grid.y),
                           static_cast<unsigned>(i / launch.grid.x / launch.grid.y)});
    };
    if (race_on) race_begin_launch(launch);
    constexpr size_t kWorthWaking =
        2048;  // threads; waking another core costs as much as some hundreds of them
    if (blocks * threads < kWorthWaking || race_on)  // the record is one thread's
        for (size_t i = 0; i < blocks; i++) run(i);
    else pool().run(blocks, run);
}

}  // namespace sim
