// Loads and launches kernels through the CUDA driver, for Python: the same calls as
// svdq_core/kernels/driver.py, with less overhead for each launch.
//
// It links neither torch nor CUDA. The driver library is opened at run time, and what it needs of
// the driver's interface is declared here, so it builds without a toolkit and fits every version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#ifdef _WIN32
#    include <windows.h>
#else
#    include <dlfcn.h>
#endif

namespace py = pybind11;

namespace {

using Result = int;
constexpr Result kInvalidContext = 201;  // this thread has not used CUDA yet
constexpr int kMaxDynamicShared = 8;     // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kEarlyInGraphs = 12030;    // the driver that captures early launches in graphs

struct LaunchAttribute {  // CUlaunchAttribute
    int id, padding, value[16];
};
struct LaunchConfig {  // CUlaunchConfig
    unsigned grid[3], block[3], shared;
    void* stream;
    LaunchAttribute* attributes;
    unsigned count;
};

void* symbol(const char* name) {
#ifdef _WIN32
    static HMODULE library = LoadLibraryA("nvcuda.dll");
    void* found = library ? reinterpret_cast<void*>(GetProcAddress(library, name)) : nullptr;
#else
    static void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    void* found = library ? dlsym(library, name) : nullptr;
#endif
    if (!found) throw py::import_error(std::string("the CUDA driver library lacks ") + name);
    return found;
}

template <class Function>
Function entry(const char* name) {
    return reinterpret_cast<Function>(symbol(name));
}

class Launcher {
  public:
    Launcher()
        : error_string_(entry<Result (*)(Result, const char**)>("cuGetErrorString")),
          load_(entry<Result (*)(void**, const void*)>("cuModuleLoadData")),
          function_(entry<Result (*)(void**, void*, const char*)>("cuModuleGetFunction")),
          attribute_(entry<Result (*)(void*, int, int)>("cuFuncSetAttribute")),
          launch_(entry<Launch>("cuLaunchKernel")) {
        check(entry<Result (*)(unsigned)>("cuInit")(0), "cuInit");
        int version = 0;
        check(entry<Result (*)(int*)>("cuDriverGetVersion")(&version), "cuDriverGetVersion");
        if (version >= kEarlyInGraphs) launch_early_ = entry<LaunchEarly>("cuLaunchKernelEx");
    }

    std::uintptr_t load(py::bytes image, const std::string& name, int shared_bytes) {
        const std::string code = image;
        void *module = nullptr, *function = nullptr;
        check(load_(&module, code.data()), "loading " + name);
        check(function_(&function, module, name.c_str()), name);
        check(attribute_(function, kMaxDynamicShared, shared_bytes), "shared memory of " + name);
        return reinterpret_cast<std::uintptr_t>(function);
    }

    void launch(std::uintptr_t function, std::tuple<unsigned, unsigned, unsigned> grid,
                unsigned threads, unsigned shared, std::uintptr_t stream, py::bytes arguments,
                bool early) {
        void* parameters[] = {PyBytes_AS_STRING(arguments.ptr())};
        const auto [x, y, z] = grid;
        auto start = [&, x = x, y = y, z = z] {
            if (early && launch_early_) {
                // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
                LaunchAttribute attribute{6, 0, {1}};
                const LaunchConfig config{{x, y, z},  {threads, 1, 1},
                                          shared,     reinterpret_cast<void*>(stream),
                                          &attribute, 1};
                return launch_early_(&config, reinterpret_cast<void*>(function), parameters,
                                     nullptr);
            }
            return launch_(reinterpret_cast<void*>(function), x, y, z, threads, 1, 1, shared,
                           reinterpret_cast<void*>(stream), parameters, nullptr);
        };
        Result result = start();
        if (result == kInvalidContext) {
            py::module_::import("torch").attr("cuda").attr("synchronize")();  // binds this thread
            result = start();
        }
        check(result, "launching a kernel");
    }

  private:
    using Launch = Result (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                              unsigned, void*, void**, void**);

    using LaunchEarly = Result (*)(const LaunchConfig*, void*, void**, void**);

    void check(Result result, const std::string& what) const {
        if (!result) return;
        const char* text = nullptr;
        error_string_(result, &text);
        throw std::runtime_error(std::string("CUDA driver: ") + (text ? text : "unknown error") +
                                 " while " + what);
    }

    Result (*error_string_)(Result, const char**);
    Result (*load_)(void**, const void*);
    Result (*function_)(void**, void*, const char*);
    Result (*attribute_)(void*, int, int);
    Launch launch_;
    LaunchEarly launch_early_ = nullptr;
};

}  // namespace

PYBIND11_MODULE(_launcher, module) {
    module.doc() = "Loads and launches kernels through the CUDA driver.";
    py::class_<Launcher>(module, "Launcher")
        .def(py::init<>())
        .def("load", &Launcher::load)
        .def("launch", &Launcher::launch);
}
