/* A GPU without a GPU: as much of CUDA's libraries as ONNX Runtime's provider asks for answers. Memory is the host's,
   kernels do nothing. What is not here returns 0, success (fake_gpu.py). Signatures are those of CUDA 13. */

#include <malloc.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  char name[256], uuid[16], luid[8];
  unsigned luid_device_node_mask;
  size_t total_global_memory, shared_memory_per_block;
  int registers_per_block, warp_size;
  size_t memory_pitch;
  int max_threads_per_block, max_threads[3], max_grid[3];
  size_t total_constant_memory;
  int major, minor;
  size_t texture_alignment, texture_pitch_alignment;
  int multiprocessors;
} Properties; /* the beginning of cudaDeviceProp */

/* an A100 */
int cudaGetDeviceProperties(Properties *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "fake_gpu.c");
  p->total_global_memory = 80ull << 30;
  p->shared_memory_per_block = 48 << 10;
  p->registers_per_block = 65536;
  p->warp_size = 32;
  p->max_threads_per_block = p->max_threads[0] = p->max_threads[1] = 1024;
  p->max_threads[2] = 64;
  p->max_grid[0] = 2147483647;
  p->max_grid[1] = p->max_grid[2] = 65535;
  p->major = 8;
  p->multiprocessors = 108;
  return 0;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 1: *value = 1024; break;       /* threads of a block */
    case 8: *value = 48 << 10; break;   /* shared memory of a block */
    case 10: *value = 32; break;        /* warp */
    case 16: *value = 108; break;       /* multiprocessors */
    case 39: *value = 2048; break;      /* threads of a multiprocessor */
    case 75: *value = 8; break;         /* compute capability, major */
    case 97: *value = 163 << 10; break; /* shared memory of a block, opted in */
    default: *value = 0;
  }
  return 0;
}

int cuDeviceGetName(char *name, int size, int device) { return strncpy(name, "fake_gpu.c", size), 0; }

static int number(int *out, int value) { return *out = value, 0; }
int cuDeviceGetCount(int *n) { return number(n, 1); }
int cudaGetDeviceCount(int *n) { return number(n, 1); }
int cudaGetDevice(int *n) { return number(n, 0); }
int cuDriverGetVersion(int *n) { return number(n, 13000); }
int cudaDriverGetVersion(int *n) { return number(n, 13000); }
int cudaRuntimeGetVersion(int *n) { return number(n, 13000); }
int cudaStreamIsCapturing(void *stream, int *status) { return number(status, 0); }
int cublasGetMathMode(void *handle, int *mode) { return number(mode, 0); }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t s, unsigned g) {
  return number(n, 2);
}
size_t cudnnGetVersion(void) { return 91000; }

static int allocate(void **p, size_t size) { return *p = calloc(1, size + 256), *p ? 0 : 2; }
static int handle(void **p) { return allocate(p, 4096); }
int cudaMalloc(void **p, size_t size) { return allocate(p, size); }
int cudaMallocHost(void **p, size_t size) { return allocate(p, size); }
int cudaHostAlloc(void **p, size_t size, unsigned flags) { return allocate(p, size); }
int cudaFree(void *p) { return free(p), 0; }
int cudaFreeHost(void *p) { return free(p), 0; }
int cudaStreamCreate(void **p) { return handle(p); }
int cudaStreamCreateWithFlags(void **p, unsigned flags) { return handle(p); }
int cudaEventCreate(void **p) { return handle(p); }
int cudaEventCreateWithFlags(void **p, unsigned flags) { return handle(p); }
int cublasCreate_v2(void **p) { return handle(p); }
int cublasLtCreate(void **p) { return handle(p); }
int cudnnCreate(void **p) { return handle(p); }

int cudaMemGetInfo(size_t *left, size_t *all) {
  struct mallinfo2 heap = mallinfo2();
  *all = 80ull << 30;
  *left = *all - heap.uordblks - heap.hblkhd;
  return 0;
}
int cuMemGetInfo_v2(size_t *left, size_t *all) { return cudaMemGetInfo(left, all); }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { return memmove(to, from, size), 0; }
/* FAKE_GPU_LOG: whether to print the integers that are copied to the GPU one by one */
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  if (size == sizeof(long) && kind == 1 && getenv("FAKE_GPU_LOG")) fprintf(stderr, "copied %ld\n", *(long *)from);
  return memmove(to, from, size), 0;
}
int cudaMemset(void *to, int value, size_t size) { return memset(to, value, size), 0; }
int cudaMemsetAsync(void *to, int value, size_t size, void *stream) { return memset(to, value, size), 0; }

typedef struct { int type, device; void *on_device, *on_host; long reserved[8]; } PointerAttributes;
int cudaPointerGetAttributes(PointerAttributes *a, void *p) {
  memset(a, 0, offsetof(PointerAttributes, reserved));
  a->type = 2; /* device memory */
  a->on_device = p;
  return 0;
}

typedef struct { size_t shared, constant, local; int max_threads, registers, ptx, binary; } FunctionAttributes;
int cudaFuncGetAttributes(FunctionAttributes *a, const void *function) {
  memset(a, 0, sizeof *a);
  a->max_threads = 1024;
  a->ptx = a->binary = 80;
  return 0;
}

const char *cudaGetErrorName(int e) { return "fake_gpu.c"; }
const char *cudaGetErrorString(int e) { return "fake_gpu.c"; }
const char *cublasGetStatusName(int e) { return "fake_gpu.c"; }
const char *cublasGetStatusString(int e) { return "fake_gpu.c"; }
const char *cudnnGetErrorString(int e) { return "fake_gpu.c"; }
