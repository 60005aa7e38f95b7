// GPUs that compute nothing: PyTorch's CUDA path, run where no GPU is. See run, which builds it.
//
// It stands in for CUDA's runtime and driver, for cuBLAS and for NCCL. Real are: all of Python,
// PyTorch's own checks, its choice of kernels, its allocator (device memory is mapped host memory,
// whose untouched pages cost nothing, and which ends where a GPU's would), the order of streams and
// events, Triton's compiling, what a CUDA graph may hold (what may not be captured is refused),
// copies between host and device, and NCCL's collectives (through /dev/shm).
// Not real are: values, as kernels and multiplications do nothing, and times.
// The device's name begins with FAKE, so that nothing made on it is taken for a GPU's.
//
// Environment: FAKECUDA_GPU=a100|h100, FAKECUDA_COUNT (how many), FAKECUDA_GIB (memory of each),
// FAKECUDA_CC=75 (another compute capability), FAKECUDA_SMALL_DATA=1 (collectives of more than
// 1 MiB move nothing, which is quicker), CUDA_VISIBLE_DEVICES (as CUDA has it).
// What a process calls can be recorded, with its stream: fakecuda_record(1 or 0), fakecuda_clear(),
// fakecuda_note(text), fakecuda_dump(file), by ctypes.CDLL(None) from Python.
// Of small floats the headers below need names alone, and their own headers need nvcc's.
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
#define __CUDA_FP8_H__
struct __half;
struct __nv_bfloat16;
typedef __nv_bfloat16 nv_bfloat16;
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cublasLt.h>
#include <cublas_v2.h>
#include <nccl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <fcntl.h>
#include <unistd.h>
#include <dlfcn.h>
#include <time.h>
#include <sched.h>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>
#define API extern "C" __attribute__((visibility("default")))

// 1. Recording

static double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}
static std::mutex lock_;
static std::atomic<bool> recording{false};
struct Record {
    double t;
    const char* kind;
    long stream;
    std::string text;
};
static std::vector<Record>& records() {
    static auto* r = new std::vector<Record>;
    return *r;
}
static void put(const char* kind, long stream, const char* form = "", ...) {
    if (!recording) return;
    char text[512];
    va_list a;
    va_start(a, form);
    vsnprintf(text, sizeof text, form, a);
    va_end(a);
    std::lock_guard<std::mutex> g(lock_);
    records().push_back({now(), kind, stream, text});
}
API void fakecuda_record(int on) { recording = on; }
API void fakecuda_clear() {
    std::lock_guard<std::mutex> g(lock_);
    records().clear();
}
API void fakecuda_note(const char* text) { put("note", -1, "%s", text); }
API void fakecuda_dump(const char* path) {
    std::lock_guard<std::mutex> g(lock_);
    FILE* f = fopen(path, "w");
    for (auto& r : records())
        fprintf(f, "%.9f\t%s\t%ld\t%s\n", r.t, r.kind, r.stream, r.text.c_str());
    fclose(f);
}
API int fakecuda_default(const char* name) {
    put("call", -1, "%s", name);
    return 0;
}  // of all that is not written here

// 2. Device

static bool h100() {
    static bool h = getenv("FAKECUDA_GPU") && !strcmp(getenv("FAKECUDA_GPU"), "h100");
    return h;
}
static int count_devices() {
    const char* count = getenv("FAKECUDA_COUNT");
    int n = count ? atoi(count) : 1;
    const char* visible = getenv("CUDA_VISIBLE_DEVICES");
    if (!visible) return n;
    // A list of numbers, or "" or -1 for none.
    int listed = 0;
    std::istringstream list(visible);
    for (std::string number; std::getline(list, number, ',');) {
        int i = atoi(number.c_str());
        if (i < 0 || i >= n) break;
        listed++;
    }
    return listed;
}
static int devices() {
    static int n = count_devices();
    return n;
}
static int capability() {
    const char* cc = getenv("FAKECUDA_CC");
    return cc ? atoi(cc) : h100() ? 90 : 80;
}
static size_t total() {
    static size_t t = (getenv("FAKECUDA_GIB") ? atof(getenv("FAKECUDA_GIB"))
                       : h100()               ? 79.2
                                              : 39.4) *
                      (1ull << 30);
    return t;
}
static thread_local int device = 0;
static std::atomic<size_t> used[64];  // bytes, of each device
static int attribute(int a) {
    switch (a) {
        case cudaDevAttrComputeCapabilityMajor: return capability() / 10;
        case cudaDevAttrComputeCapabilityMinor: return capability() % 10;
        case cudaDevAttrMultiProcessorCount: return h100() ? 132 : 108;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return h100() ? 232448 : 166912;
        case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return h100() ? 233472 : 167936;
        case cudaDevAttrMaxRegistersPerBlock:
        case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
        case cudaDevAttrMaxThreadsPerBlock: return 1024;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
        case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrL2CacheSize: return h100() ? 52428800 : 41943040;
        case cudaDevAttrMaxGridDimX: return 2147483647;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: return 65535;
        case cudaDevAttrMaxBlockDimX:
        case cudaDevAttrMaxBlockDimY: return 1024;
        case cudaDevAttrMaxBlockDimZ: return 64;
        case cudaDevAttrMemoryClockRate: return h100() ? 2619000 : 1215000;
        case cudaDevAttrGlobalMemoryBusWidth: return 5120;
        case cudaDevAttrClockRate: return h100() ? 1980000 : 1410000;
        case cudaDevAttrConcurrentKernels:
        case cudaDevAttrUnifiedAddressing:
        case cudaDevAttrManagedMemory: return 1;
    }
    return 0;
}
API cudaError_t cudaGetDeviceCount(int* n) {
    *n = devices();
    return cudaSuccess;
}
API cudaError_t cudaGetDevice(int* d) {
    *d = device;
    return cudaSuccess;
}
API cudaError_t cudaSetDevice(int d) {
    if (d < 0 || d >= devices()) return cudaErrorInvalidDevice;
    device = d;
    return cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
    if (d >= devices()) return cudaErrorInvalidDevice;
    memset(p, 0, sizeof *p);
    strcpy(p->name, h100() ? "FAKE NVIDIA H100 80GB HBM3" : "FAKE NVIDIA A100-PCIE-40GB");
    p->major = capability() / 10;
    p->minor = capability() % 10;
    p->totalGlobalMem = total();
    p->warpSize = 32;
    p->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
    p->maxBlocksPerMultiProcessor = 32;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->concurrentKernels = p->unifiedAddressing = p->managedMemory = 1;
    p->memoryBusWidth = 5120;
    p->textureAlignment = 512;
    p->pciBusID = d + 1;
    p->uuid.bytes[0] = d + 1;
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
    *v = attribute(a);
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int d) {
    snprintf(s, n, "0000:%02x:00.0", d + 1);
    return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int* v) {
    *v = CUDART_VERSION;
    return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int* v) {
    *v = CUDART_VERSION;
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* l, int* g) {
    *l = 0;
    *g = -5;
    return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* c, int, int) {
    *c = 1;
    return cudaSuccess;
}
API const char* cudaGetErrorName(cudaError_t e) {
    return e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "fakecuda error";
}
API const char* cudaGetErrorString(cudaError_t e) {
    return e == cudaErrorMemoryAllocation ? "out of memory"
           : e == cudaErrorStreamCaptureUnsupported
               ? "operation not permitted when stream is capturing"
               : "fakecuda error";
}
API cudaError_t cudaGetLastError() { return cudaSuccess; }
API cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

// 3. Streams and events. What may not be captured is refused, as CUDA refuses it.

static std::atomic<long> next_stream{1};
static std::atomic<long> capturing{-1};  // a stream's number
static std::unordered_map<long, bool>& captured() {
    static auto* m = new std::unordered_map<long, bool>;
    return *m;
}  // streams that joined
static long id(cudaStream_t s) { return (long)s; }
#define REFUSE(what)                                             \
    if (capturing >= 0) {                                        \
        put("REFUSED", capturing, what);                         \
        fprintf(stderr, "fakecuda: %s while capturing\n", what); \
        return cudaErrorStreamCaptureUnsupported;                \
    }
API cudaError_t cudaStreamCreate(cudaStream_t* s) {
    *s = (cudaStream_t)(0x1000 + next_stream++);
    return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return cudaStreamCreate(s); }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) {
    return cudaStreamCreate(s);
}
API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) {
    *p = 0;
    return cudaSuccess;
}
API cudaError_t cudaStreamQuery(cudaStream_t s) {
    REFUSE("cudaStreamQuery");
    return cudaSuccess;
}
static thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
API cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    put("SYNC", id(s), "cudaStreamSynchronize");
    // In the relaxed mode a thread may wait for a stream that is not being captured.
    if (capture_mode != cudaStreamCaptureModeRelaxed || captured().count(id(s)))
        REFUSE("cudaStreamSynchronize");
    return cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize() {
    put("SYNC", -1, "cudaDeviceSynchronize");
    REFUSE("cudaDeviceSynchronize");
    return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
    put("capture", id(s), "begin");
    capturing = id(s);
    captured()[id(s)] = true;
    return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* g) {
    put("capture", id(s), "end");
    capturing = -1;
    captured().clear();
    *g = (cudaGraph_t)0x77;
    return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* c) {
    *c = capturing >= 0 && captured().count(id(s)) ? cudaStreamCaptureStatusActive
                                                   : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
#if CUDART_VERSION >= 13000
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* c,
                                         unsigned long long* i, cudaGraph_t* g,
                                         const cudaGraphNode_t** n, const cudaGraphEdgeData** e,
                                         size_t* k)
#else
API cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t s, cudaStreamCaptureStatus* c,
                                            unsigned long long* i, cudaGraph_t* g,
                                            const cudaGraphNode_t** n, size_t* k)
#endif
{
    cudaStreamIsCapturing(s, c);
    if (i) *i = 1;
    if (g) *g = (cudaGraph_t)0x77;
    if (n) *n = nullptr;
    if (k) *k = 0;
    return cudaSuccess;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(capture_mode, *mode);
    return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* x, cudaGraph_t, unsigned long long) {
    *x = (cudaGraphExec_t)0x78;
    return cudaSuccess;
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* x, cudaGraph_t, unsigned long long) {
    *x = (cudaGraphExec_t)0x78;
    return cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t s) {
    put("kernel", id(s), "graph launch");
    return cudaSuccess;
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* n) {
    *n = 1;
    return cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t f, void* d) {
    f(d);
    return cudaSuccess;
}
API cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void* d, unsigned) {
    f(s, cudaSuccess, d);
    return cudaSuccess;
}

struct Event {
    double t = 0;
    long number;
};
static std::atomic<long> next_event{1};
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
    auto* x = new Event;
    x->number = next_event++;
    *e = (cudaEvent_t)x;
    return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t) {
    return cudaSuccess;
}  // leaks: an event's number stays its own
API cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    auto* x = (Event*)e;
    x->t = now();
    put("record", id(s), "%ld", x->number);
    return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) {
    return cudaEventRecord(e, s);
}
API cudaError_t cudaEventQuery(cudaEvent_t) {
    return cudaSuccess;
}  // of another thread (NCCL's watchdog) often: not recorded
API cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    put("SYNC", -1, "cudaEventSynchronize %ld", ((Event*)e)->number);
    REFUSE("cudaEventSynchronize");
    return cudaSuccess;
}
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
    if (!((Event*)a)->t || !((Event*)b)->t) return cudaErrorInvalidResourceHandle;
    *ms = (((Event*)b)->t - ((Event*)a)->t) * 1e3;
    return cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
    put("wait", id(s), "%ld", ((Event*)e)->number);
    if (capturing >= 0) captured()[id(s)] = true;
    return cudaSuccess;
}

// 4. Memory

struct Block {
    size_t size;
    int device;
};
static std::map<char*, Block>& blocks() {
    static auto* m = new std::map<char*, Block>;
    return *m;
}
// Returns the block that holds an address, or null: then it is the host's.
static const Block* find_block(const void* p) {
    auto next = blocks().upper_bound((char*)p);
    if (next == blocks().begin()) return nullptr;
    auto block = --next;
    return (char*)p < block->first + block->second.size ? &block->second : nullptr;
}
API cudaError_t cudaMalloc(void** p, size_t n) {
    put("malloc", -1, "%zu", n);
    if (!n) {
        *p = nullptr;
        return cudaSuccess;
    }
    if (used[device] + n > total()) {
        *p = nullptr;
        return cudaErrorMemoryAllocation;
    }
    *p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
              0);
    if (*p == MAP_FAILED) {
        *p = nullptr;
        return cudaErrorMemoryAllocation;
    }
    std::lock_guard<std::mutex> g(lock_);
    blocks()[(char*)*p] = {n, device};
    used[device] += n;
    return cudaSuccess;
}
API cudaError_t cudaFree(void* p) {
    if (!p) return cudaSuccess;
    std::lock_guard<std::mutex> g(lock_);
    auto i = blocks().find((char*)p);
    if (i == blocks().end()) return cudaErrorInvalidValue;
    munmap(p, i->second.size);
    used[i->second.device] -= i->second.size;
    blocks().erase(i);
    return cudaSuccess;
}
API cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
API cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
API cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) {
    REFUSE("cudaHostAlloc");
    *p = aligned_alloc(4096, (n + 4095) / 4096 * 4096);
    return cudaSuccess;
}
API cudaError_t cudaFreeHost(void* p) {
    free(p);
    return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t* f, size_t* t) {
    *t = total();
    *f = *t - used[device];
    return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
    std::lock_guard<std::mutex> g(lock_);
    memset(a, 0, sizeof *a);
    const Block* block = find_block(p);
    a->type = block ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    if (block) {
        a->device = block->device;
        a->devicePointer = (void*)p;
    }
    return cudaSuccess;
}
static const char* ways[] = {"H2H", "H2D", "D2H", "D2D", "any"};
static cudaError_t copy(void* d, const void* s, size_t n, int kind, cudaStream_t t, bool blocking) {
    if (kind == 4) {
        std::lock_guard<std::mutex> g(lock_);
        kind = (find_block(s) ? 2 : 0) + (find_block(d) ? 1 : 0);
    }
    put(kind == 2 || blocking ? "COPY" : "copy", id(t), "%s %zu %p %p", ways[kind], n, d, s);
    if (n) memmove(d, s, n);
    return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind k,
                                cudaStream_t t) {
    return copy(d, s, n, k, t, false);
}
API cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind k) {
    REFUSE("cudaMemcpy");
    return copy(d, s, n, k, 0, true);
}
API cudaError_t cudaMemcpyPeerAsync(void* d, int, const void* s, int, size_t n, cudaStream_t t) {
    return copy(d, s, n, 3, t, false);
}
API cudaError_t cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h,
                                  cudaMemcpyKind k, cudaStream_t t) {
    put("copy", id(t), "2D %s %zu", ways[k], w * h);
    for (size_t i = 0; i < h; i++) memmove((char*)d + i * dp, (const char*)s + i * sp, w);
    return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void* d, int v, size_t n, cudaStream_t t) {
    put("memset", id(t), "%zu %p", n, d);
    char *b = (char*)(((size_t)d + 4095) / 4096 * 4096),
         *e = (char*)((size_t)((char*)d + n) / 4096 * 4096);
    if (!v && e > b) {
        madvise(b, e - b, MADV_DONTNEED);
        memset(d, 0, b - (char*)d);
        memset(e, 0, (char*)d + n - e);
    } else
        memset(d, v, n);
    return cudaSuccess;
}
API cudaError_t cudaMemset(void* d, int v, size_t n) { return cudaMemsetAsync(d, v, n, 0); }

// 5. Kernels

static std::unordered_map<const void*, std::string>& names() {
    static auto* m = new std::unordered_map<const void*, std::string>;
    return *m;
}
API void** __cudaRegisterFatBinary(void*) {
    static void* p[8];
    return p;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*,
                                uint3*, dim3*, dim3*, int*) {
    std::lock_guard<std::mutex> g(lock_);
    names()[host] = name;
}
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API char __cudaInitModule(void**) { return 1; }
struct Call {
    dim3 g, b;
    size_t s;
    cudaStream_t t;
};
static thread_local std::vector<Call> calls;
API unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t s, cudaStream_t t) {
    calls.push_back({g, b, s, t});
    return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* s, void* t) {
    auto c = calls.back();
    calls.pop_back();
    *g = c.g;
    *b = c.b;
    *s = c.s;
    *(cudaStream_t*)t = c.t;
    return cudaSuccess;
}
static cudaError_t launch(const void* f, dim3 g, dim3 b, cudaStream_t t) {
    if (!recording) return cudaSuccess;
    std::string name;
    {
        std::lock_guard<std::mutex> l(lock_);
        auto i = names().find(f);
        name = i == names().end() ? "?" : i->second;
    }
    put("kernel", id(t), "%.380s <<<%u,%u,%u x %u,%u,%u>>>", name.c_str(), g.x, g.y, g.z, b.x, b.y,
        b.z);
    return cudaSuccess;
}
API cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void**, size_t, cudaStream_t t) {
    return launch(f, g, b, t);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void**) {
    return launch(f, c->gridDim, c->blockDim, c->stream);
}
API cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 g, dim3 b, void**, size_t,
                                            cudaStream_t t) {
    return launch(f, g, b, t);
}
API cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* f) {
    *k = (cudaKernel_t)f;
    return cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void**, size_t, cudaStream_t t) {
    return launch((const void*)k, g, b, t);
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 64;
    a->binaryVersion = a->ptxVersion = capability();
    a->maxDynamicSharedSizeBytes = 49152;
    return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) {
    *n = 2;
    return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int,
                                                                       size_t, unsigned) {
    *n = 2;
    return cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void** p, const void*) {
    static char room[1 << 20];
    *p = room;
    return cudaSuccess;
}
#if CUDART_VERSION >= 12050
API cudaError_t cudaGetDriverEntryPointByVersion(const char* n, void** f, unsigned,
                                                 unsigned long long,
                                                 cudaDriverEntryPointQueryResult* r) {
    *f = dlsym(RTLD_DEFAULT, n);
    if (r) *r = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
#endif
API cudaError_t cudaGetDriverEntryPoint(const char* n, void** f, unsigned long long,
                                        cudaDriverEntryPointQueryResult* r) {
    *f = dlsym(RTLD_DEFAULT, n);
    if (r) *r = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

// 6. Driver: what Triton and Inductor call

API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int* v) {
    *v = CUDART_VERSION;
    return CUDA_SUCCESS;
}
API CUresult cuDeviceGetCount(int* n) {
    *n = devices();
    return CUDA_SUCCESS;
}
API CUresult cuDeviceGet(CUdevice* d, int n) {
    *d = n;
    return CUDA_SUCCESS;
}
API CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice) {
    *v = attribute(a);
    return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice) {
    *c = (CUcontext)0x55;
    return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* f, int* a) {
    *f = 0;
    *a = 1;
    return CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext* c) {
    *c = (CUcontext)0x55;
    return CUDA_SUCCESS;
}
API CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
API CUresult cuCtxGetDevice(CUdevice* d) {
    *d = device;
    return CUDA_SUCCESS;
}
API CUresult cuGetErrorString(CUresult, const char** s) {
    *s = "fakecuda error";
    return CUDA_SUCCESS;
}
API CUresult cuGetErrorName(CUresult, const char** s) {
    *s = "fakecuda error";
    return CUDA_SUCCESS;
}
API CUresult cuModuleLoadData(CUmodule* m, const void*) {
    *m = (CUmodule)0x66;
    return CUDA_SUCCESS;
}
API CUresult cuModuleLoadDataEx(CUmodule* m, const void*, unsigned, CUjit_option*, void**) {
    *m = (CUmodule)0x66;
    return CUDA_SUCCESS;
}
API CUresult cuModuleLoad(CUmodule* m, const char*) {
    *m = (CUmodule)0x66;
    return CUDA_SUCCESS;
}
API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
API CUresult cuModuleGetFunction(CUfunction* f, CUmodule, const char* n) {
    auto* s = strdup(n);
    {
        std::lock_guard<std::mutex> g(lock_);
        names()[s] = n;
    }
    *f = (CUfunction)s;
    return CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction) {
    *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
         : a == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 64
                                                      : 0;
    return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
API CUresult cuLaunchKernel(CUfunction f, unsigned a, unsigned b, unsigned c, unsigned d,
                            unsigned e, unsigned g, unsigned, CUstream t, void**, void**) {
    return (CUresult)launch(f, dim3(a, b, c), dim3(d, e, g), t);
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void**, void**) {
    return (CUresult)launch(f, dim3(c->gridDimX, c->gridDimY, c->gridDimZ),
                            dim3(c->blockDimX, c->blockDimY, c->blockDimZ), c->hStream);
}
API CUresult cuPointerGetAttribute(void* v, CUpointer_attribute a, CUdeviceptr p) {
    if (a == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
        *(CUdeviceptr*)v = p;
    else if (a == CU_POINTER_ATTRIBUTE_CONTEXT)
        *(CUcontext*)v = (CUcontext)0x55;
    else
        *(int*)v = 0;
    return CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) {
    *n = 1;
    return CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction, int, size_t) {
    *n = 2;
    return CUDA_SUCCESS;
}

// 7. cuBLAS

struct Blas {
    cudaStream_t s = 0;
    cublasMath_t m = CUBLAS_DEFAULT_MATH;
    cublasPointerMode_t p = CUBLAS_POINTER_MODE_HOST;
};
API cublasStatus_t cublasCreate_v2(cublasHandle_t* h) {
    *h = (cublasHandle_t) new Blas;
    return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasDestroy_v2(cublasHandle_t) { return CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasSetStream_v2(cublasHandle_t h, cudaStream_t s) {
    ((Blas*)h)->s = s;
    return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasGetStream_v2(cublasHandle_t h, cudaStream_t* s) {
    *s = ((Blas*)h)->s;
    return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasSetMathMode(cublasHandle_t h, cublasMath_t m) {
    ((Blas*)h)->m = m;
    return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasGetMathMode(cublasHandle_t h, cublasMath_t* m) {
    *m = ((Blas*)h)->m;
    return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t h, cublasPointerMode_t m) {
    ((Blas*)h)->p = m;
    return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t h, cublasPointerMode_t* m) {
    *m = ((Blas*)h)->p;
    return CUBLAS_STATUS_SUCCESS;
}
API const char* cublasGetStatusString(cublasStatus_t) { return "fakecuda"; }
static const char* type(int t) {
    return t == CUDA_R_32F    ? "f32"
           : t == CUDA_R_16BF ? "bf16"
           : t == CUDA_R_16F  ? "f16"
           : t == CUDA_R_64F  ? "f64"
                              : "?";
}
API cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m,
                                int n, int k, const void*, const void*, cudaDataType a, int,
                                const void*, cudaDataType b, int, const void*, void*,
                                cudaDataType c, int, cublasComputeType_t t, cublasGemmAlgo_t) {
    put("gemm", id(((Blas*)h)->s), "%d %d %d 1 %s %s%s math %d compute %d", m, n, k, type(a),
        ta ? "T" : "N", tb ? "T" : "N", (int)((Blas*)h)->m, (int)t);
    return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t h, cublasOperation_t ta,
                                              cublasOperation_t tb, int m, int n, int k,
                                              const void*, const void*, cudaDataType a, int,
                                              long long, const void*, cudaDataType, int, long long,
                                              const void*, void*, cudaDataType, int, long long,
                                              int batch, cublasComputeType_t t, cublasGemmAlgo_t) {
    put("gemm", id(((Blas*)h)->s), "%d %d %d %d %s %s%s math %d compute %d", m, n, k, batch,
        type(a), ta ? "T" : "N", tb ? "T" : "N", (int)((Blas*)h)->m, (int)t);
    return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasSgemm_v2(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb,
                                  int m, int n, int k, const float*, const float*, int,
                                  const float*, int, const float*, float*, int) {
    put("gemm", id(((Blas*)h)->s), "%d %d %d 1 f32 %s%s math %d", m, n, k, ta ? "T" : "N",
        tb ? "T" : "N", (int)((Blas*)h)->m);
    return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t h, cublasOperation_t ta,
                                             cublasOperation_t tb, int m, int n, int k,
                                             const float*, const float*, int, long long,
                                             const float*, int, long long, const float*, float*,
                                             int, long long, int batch) {
    put("gemm", id(((Blas*)h)->s), "%d %d %d %d f32 %s%s math %d", m, n, k, batch, ta ? "T" : "N",
        tb ? "T" : "N", (int)((Blas*)h)->m);
    return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasSgemv_v2(cublasHandle_t h, cublasOperation_t, int m, int n, const float*,
                                  const float*, int, const float*, int, const float*, float*, int) {
    put("gemm", id(((Blas*)h)->s), "%d 1 %d 1 f32 gemv", m, n);
    return CUBLAS_STATUS_SUCCESS;
}
struct Layout {
    cudaDataType t;
    uint64_t r, c;
    int64_t ld;
    int32_t batch = 1;
};
struct Desc {
    int ta = 0, tb = 0, epilogue = 1;
};
API cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* l, cudaDataType t, uint64_t r,
                                              uint64_t c, int64_t ld) {
    *l = (cublasLtMatrixLayout_t) new Layout{t, r, c, ld};
    return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
    delete (Layout*)l;
    return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l,
                                                    cublasLtMatrixLayoutAttribute_t a,
                                                    const void* v, size_t) {
    if (a == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) ((Layout*)l)->batch = *(int32_t*)v;
    return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* d, cublasComputeType_t,
                                            cudaDataType_t) {
    *d = (cublasLtMatmulDesc_t) new Desc;
    return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
    delete (Desc*)d;
    return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d,
                                                  cublasLtMatmulDescAttributes_t a, const void* v,
                                                  size_t) {
    auto* x = (Desc*)d;
    if (a == CUBLASLT_MATMUL_DESC_TRANSA) x->ta = *(int*)v;
    if (a == CUBLASLT_MATMUL_DESC_TRANSB) x->tb = *(int*)v;
    if (a == CUBLASLT_MATMUL_DESC_EPILOGUE) x->epilogue = *(int*)v;
    return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* p) {
    *p = (cublasLtMatmulPreference_t)0x99;
    return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t) {
    return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t,
                                                  cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                                  cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                                  cublasLtMatmulPreference_t, int,
                                                  cublasLtMatmulHeuristicResult_t* r, int* n) {
    memset(r, 0, sizeof *r);
    *n = 1;
    return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t d, const void*,
                                  const void*, cublasLtMatrixLayout_t a, const void*,
                                  cublasLtMatrixLayout_t, const void*, const void*,
                                  cublasLtMatrixLayout_t, void*, cublasLtMatrixLayout_t o,
                                  const cublasLtMatmulAlgo_t*, void*, size_t, cudaStream_t s) {
    auto* x = (Desc*)d;
    auto *p = (Layout*)a, *q = (Layout*)o;
    put("gemm", id(s), "%d %d %d %d %s %s%s Lt epilogue %d", (int)q->r, (int)q->c,
        (int)(x->ta ? p->r : p->c), q->batch, type(p->t), x->ta ? "T" : "N", x->tb ? "T" : "N",
        x->epilogue);
    return CUBLAS_STATUS_SUCCESS;
}
API size_t cublasLtGetVersion() { return 130100; }

// 8. NCCL: collectives through /dev/shm, at once, in the caller's order: no stream is waited for

struct Shared {
    std::atomic<int> came, turn;
};
struct Comm {
    int rank, size, splits = 0;
    std::string name;
    char* map;
    size_t slot;
};
static const size_t SLOT = 8 << 20;
static void meet(Comm* c) {
    auto* s = (Shared*)c->map;
    int turn = s->turn;
    if (++s->came == c->size) {
        s->came = 0;
        s->turn++;
    } else
        while (s->turn == turn) sched_yield();
}
static Comm* open_comm(const std::string& name, int size, int rank) {
    auto* c = new Comm{rank, size, 0, name, nullptr, SLOT};
    int f = open(("/dev/shm/fakenccl-" + name).c_str(), O_CREAT | O_RDWR, 0600);
    size_t n = 4096 + SLOT * size;
    if (ftruncate(f, n)) perror("fakenccl");
    c->map = (char*)mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_SHARED, f, 0);
    close(f);
    meet(c);
    if (!rank) unlink(("/dev/shm/fakenccl-" + name).c_str());
    return c;
}
API ncclResult_t ncclGetVersion(int* v) {
    *v = NCCL_VERSION_CODE;
    return ncclSuccess;
}
API ncclResult_t ncclGetUniqueId(ncclUniqueId* u) {
    memset(u, 0, sizeof *u);
    snprintf(u->internal, 64, "%d-%.9f", getpid(), now());
    return ncclSuccess;
}
API ncclResult_t ncclCommInitRankConfig(ncclComm_t* c, int n, ncclUniqueId u, int r,
                                        ncclConfig_t*) {
    put("nccl", -1, "init %d of %d", r, n);
    *c = (ncclComm_t)open_comm(u.internal, n, r);
    return ncclSuccess;
}
API ncclResult_t ncclCommInitRank(ncclComm_t* c, int n, ncclUniqueId u, int r) {
    return ncclCommInitRankConfig(c, n, u, r, nullptr);
}
API ncclResult_t ncclCommInitAll(ncclComm_t* c, int n, const int*) {
    for (int i = 0; i < n; i++) c[i] = (ncclComm_t) new Comm{i, n, 0, "all", nullptr, SLOT};
    return ncclSuccess;
}  // DataParallel's: computes nothing
API ncclResult_t ncclCommSplit(ncclComm_t p, int color, int key, ncclComm_t* c, ncclConfig_t*) {
    auto* o = (Comm*)p;
    put("nccl", -1, "split %d", color);
    auto slot = [&](int r) { return (int*)(o->map + 4096 + SLOT * r); };
    slot(o->rank)[0] = color;
    slot(o->rank)[1] = key;
    meet(o);
    int size = 0, rank = 0;
    for (int r = 0; r < o->size; r++) {
        if (slot(r)[0] != color) continue;
        size++;
        rank += slot(r)[1] < key || (slot(r)[1] == key && r < o->rank);
    }
    meet(o);
    std::string name = o->name + "-" + std::to_string(o->splits++) + "-" + std::to_string(color);
    *c = color < 0 ? nullptr : (ncclComm_t)open_comm(name, size, rank);
    return ncclSuccess;
}
API ncclResult_t ncclCommCount(const ncclComm_t c, int* n) {
    *n = ((Comm*)c)->size;
    return ncclSuccess;
}
API ncclResult_t ncclCommUserRank(const ncclComm_t c, int* n) {
    *n = ((Comm*)c)->rank;
    return ncclSuccess;
}
API ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* r) {
    *r = ncclSuccess;
    return ncclSuccess;
}
API const char* ncclGetErrorString(ncclResult_t) { return "fakenccl"; }
API const char* ncclGetLastError(ncclComm_t) { return ""; }
static size_t width(ncclDataType_t t) {
    switch ((int)t) {
        case 0:
        case 1: return 1;
        case 6:
        case 9: return 2;
        case 2:
        case 3:
        case 7: return 4;
        case 4:
        case 5:
        case 8: return 8;
    }
    return 1;
}
template <class T>
static void fold(T* a, const T* b, size_t n, int op) {
    for (size_t i = 0; i < n; i++)
        a[i] = op == 2   ? (a[i] > b[i] ? a[i] : b[i])
               : op == 3 ? (a[i] < b[i] ? a[i] : b[i])
               : op == 1 ? a[i] * b[i]
                         : a[i] + b[i];
}
static float f(uint16_t x) {
    uint32_t y = (uint32_t)x << 16;
    float z;
    memcpy(&z, &y, 4);
    return z;
}
static void fold_any(void* a, const void* b, size_t n, ncclDataType_t t, int op) {
    switch ((int)t) {
        case 0: fold((int8_t*)a, (const int8_t*)b, n, op); break;
        case 1: fold((uint8_t*)a, (const uint8_t*)b, n, op); break;
        case 2: fold((int32_t*)a, (const int32_t*)b, n, op); break;
        case 4: fold((int64_t*)a, (const int64_t*)b, n, op); break;
        case 7: fold((float*)a, (const float*)b, n, op); break;
        case 8: fold((double*)a, (const double*)b, n, op); break;
        case 9:
            for (size_t i = 0; i < n; i++) {
                float s = f(((uint16_t*)a)[i]) + f(((const uint16_t*)b)[i]);
                uint32_t y;
                memcpy(&y, &s, 4);
                ((uint16_t*)a)[i] = (y + 0x7fff + ((y >> 16) & 1)) >> 16;
            }
            break;
    }
}
static bool whole_data() {
    static bool w = !getenv("FAKECUDA_SMALL_DATA");
    return w;
}  // set: collectives over 1 MiB move nothing
static ncclResult_t collect(const char* what, const void* in, void* out, size_t n, ncclDataType_t t,
                            int op, int root, Comm* c, cudaStream_t s) {
    put("nccl", id(s), "%s %zu x %zu op %d root %d", what, n, width(t), op, root);
    if (!out) return ncclSuccess;  // a reduce where another is the root
    size_t w = width(t), step = SLOT / w;
    bool gather = !strcmp(what, "all_gather"), scatter = !strcmp(what, "reduce_scatter");
    if (c->size == 1 || !c->map) {
        if (in != out) memmove(out, in, n * w);
        return ncclSuccess;
    }
    if (!whole_data() && n * w > 1 << 20) {
        meet(c);
        return ncclSuccess;
    }
    size_t all = scatter ? n * c->size : n;
    std::vector<char> mine;
    if (scatter) {
        mine.assign((const char*)in, (const char*)in + all * w);
        in = mine.data();
    }
    for (size_t at = 0; at < all; at += step) {
        size_t k = std::min(step, all - at);
        memcpy(c->map + 4096 + SLOT * c->rank, (const char*)in + at * w, k * w);
        meet(c);
        auto slot = [&](int r) { return c->map + 4096 + SLOT * r; };
        if (gather)
            for (int r = 0; r < c->size; r++) memcpy((char*)out + (r * n + at) * w, slot(r), k * w);
        else if (root >= 0)
            memcpy((char*)out + at * w, slot(root), k * w);
        else {
            std::vector<char> sum(slot(0), slot(0) + k * w);
            for (int r = 1; r < c->size; r++) fold_any(sum.data(), slot(r), k, t, op);
            if (!scatter)
                memcpy((char*)out + at * w, sum.data(), k * w);
            else
                for (size_t i = 0; i < k; i++)
                    if ((at + i) / n == (size_t)c->rank)
                        memcpy((char*)out + (at + i - c->rank * n) * w, sum.data() + i * w, w);
        }
        meet(c);
    }
    return ncclSuccess;
}
API ncclResult_t ncclAllReduce(const void* i, void* o, size_t n, ncclDataType_t t, ncclRedOp_t op,
                               ncclComm_t c, cudaStream_t s) {
    return collect("all_reduce", i, o, n, t, op, -1, (Comm*)c, s);
}
API ncclResult_t ncclReduce(const void* i, void* o, size_t n, ncclDataType_t t, ncclRedOp_t op, int,
                            ncclComm_t c, cudaStream_t s) {
    return collect("reduce", i, o, n, t, op, -1, (Comm*)c, s);
}
API ncclResult_t ncclBroadcast(const void* i, void* o, size_t n, ncclDataType_t t, int root,
                               ncclComm_t c, cudaStream_t s) {
    return collect("broadcast", ((Comm*)c)->rank == root ? i : o, o, n, t, 0, root, (Comm*)c, s);
}
API ncclResult_t ncclBcast(void* b, size_t n, ncclDataType_t t, int root, ncclComm_t c,
                           cudaStream_t s) {
    return collect("broadcast", b, b, n, t, 0, root, (Comm*)c, s);
}
API ncclResult_t ncclAllGather(const void* i, void* o, size_t n, ncclDataType_t t, ncclComm_t c,
                               cudaStream_t s) {
    return collect("all_gather", i, o, n, t, 0, -1, (Comm*)c, s);
}
API ncclResult_t ncclReduceScatter(const void* i, void* o, size_t n, ncclDataType_t t,
                                   ncclRedOp_t op, ncclComm_t c, cudaStream_t s) {
    return collect("reduce_scatter", i, o, n, t, op, -1, (Comm*)c, s);
}
API ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t* o, void*, ncclDataType_t,
                                          ncclScalarResidence_t, ncclComm_t) {
    *o = ncclSum;
    return ncclSuccess;
}
