// Names of kernels and lines of return addresses, for messages. Names come from the symbol table of the
// program's own file, so that static kernels have one too and nothing special is needed when linking.
#include <cxxabi.h>
#include <elf.h>
#include <link.h>
#include <unistd.h>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <vector>
#include "runtime.h"

namespace sim {

uintptr_t program_base() {
    uintptr_t base = 0;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
            *static_cast<uintptr_t*>(out) = info->dlpi_addr;
            return 1;  // the first is the program itself
        },
        &base);
    return base;
}

namespace {

struct Symbols {
    std::vector<char> file;
    const Elf64_Sym* begin = nullptr;
    size_t count = 0;
    const char* names = nullptr;
    uintptr_t base = program_base();

    Symbols() {
        std::ifstream in("/proc/self/exe", std::ios::binary);
        file.assign(std::istreambuf_iterator<char>(in), {});
        if (file.size() < sizeof(Elf64_Ehdr)) return;
        const auto* header = reinterpret_cast<const Elf64_Ehdr*>(file.data());
        const auto* sections = reinterpret_cast<const Elf64_Shdr*>(file.data() + header->e_shoff);
        for (int i = 0; i < header->e_shnum; i++) {
            if (sections[i].sh_type != SHT_SYMTAB) continue;
            begin = reinterpret_cast<const Elf64_Sym*>(file.data() + sections[i].sh_offset);
            count = sections[i].sh_size / sizeof(Elf64_Sym);
            names = file.data() + sections[sections[i].sh_link].sh_offset;
        }
    }
};

const Symbols& symbols() {
    static const Symbols table;
    return table;
}

std::string run(const std::string& command) {
    std::string out;
    if (FILE* pipe = popen(command.c_str(), "r")) {
        char buffer[4096];
        while (size_t n = fread(buffer, 1, sizeof(buffer), pipe)) out.append(buffer, n);
        pclose(pipe);
    }
    return out;
}

}  // namespace

const char* mangled_name(const void* function) {
    const Symbols& table = symbols();
    const uintptr_t wanted = reinterpret_cast<uintptr_t>(function) - table.base;
    for (size_t i = 0; i < table.count; i++) {
        const Elf64_Sym& symbol = table.begin[i];
        if (ELF64_ST_TYPE(symbol.st_info) == STT_FUNC && symbol.st_value == wanted)
            return table.names + symbol.st_name;
    }
    return "";
}

std::string kernel_name(const void* function) {
    const char* mangled = mangled_name(function);
    if (!*mangled) return "(unnamed)";
    int status = 0;
    char* text = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
    std::string name = status == 0 ? text : mangled;
    free(text);
    if (name.starts_with("void ")) name.erase(0, 5);  // a template's name comes with its return type
    const std::string kAnonymous = "(anonymous namespace)::";
    for (size_t at = 0; (at = name.find(kAnonymous)) != std::string::npos;) name.erase(at, kAnonymous.size());
    // The parameter list is the last parenthesis that closes at the end.
    int depth = 0;
    for (size_t i = name.size(); i-- > 0;) {
        depth += name[i] == ')' ? 1 : name[i] == '(' ? -1 : 0;
        if (name[i] == '(' && depth == 0) return name.substr(0, i);
        if (depth == 0) break;
    }
    return name;
}

std::string source_line(const void* return_address) {
    const uintptr_t call = reinterpret_cast<uintptr_t>(return_address) - symbols().base - 1;
    char command[256];
    snprintf(command, sizeof(command), "addr2line -i -e /proc/%d/exe 0x%zx 2>/dev/null",
             static_cast<int>(getpid()), static_cast<size_t>(call));
    const std::string lines = run(command);
    char here[4096];
    const std::string tree = getcwd(here, sizeof(here)) ? std::string(here) + "/" : "";
    std::string text;
    int frames = 0;
    for (size_t at = 0;
         at < lines.size() && frames < 3;) {  // innermost first; the simulator's own headers say nothing
        const size_t end = std::min(lines.find('\n', at), lines.size());
        std::string line = lines.substr(at, lines.find_first_of(" \n", at) - at);
        at = end + 1;
        if (line.find("dev/sim/") != std::string::npos || line.find("??") != std::string::npos) continue;
        for (const std::string& prefix : {tree, std::string("./")})
            if (line.starts_with(prefix)) line.erase(0, prefix.size());
        if (line.starts_with("/usr/")) continue;
        text += (frames++ ? " from " : "") + line;
    }
    return text;
}

}  // namespace sim
