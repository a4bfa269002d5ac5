// SPDX-License-Identifier: Apache-2.0
// A driver without a device: device memory is host memory, a stream runs at once. It stands in for
// libascendcl.so so that the real torch_npu starts on any machine. Entry points that torch_npu
// links and that are not here are generated as functions that return 0 (torch_npu.py). Built-in
// operators of the chip fail: only copies and our own kernels work.
#include <cstdint>
#include <cstdlib>
#include <cstring>

extern "C" {

void skipvit_model_memory(void* base, int64_t bytes);  // the model's kernels may touch it

static int context, stream_count;

int aclrtGetDeviceCount(uint32_t* count) {
  *count = 1;
  return 0;
}
int aclrtGetDevice(int32_t* device) {
  *device = 0;
  return 0;
}
const char* aclrtGetSocName() {
  const char* name = std::getenv("SKIPVIT_FAKE_SOC");
  return name != nullptr ? name : "Ascend910A";
}
int fake_acl_capability_calls = 0;
int aclGetDeviceCapability(uint32_t, int, int64_t* value) {
  ++fake_acl_capability_calls;
  *value = 32;
  return 0;
}
int aclrtGetCurrentContext(void** out) {
  *out = &context;
  return 0;
}
int aclrtGetMemInfo(int, size_t* free_bytes, size_t* total_bytes) {
  *free_bytes = *total_bytes = size_t{8} << 30;
  return 0;
}

int aclrtMalloc(void** out, size_t bytes, int) {
  *out = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
  std::memset(*out, 0xA5, bytes);  // nothing is zero by luck
  skipvit_model_memory(*out, static_cast<int64_t>(bytes));
  return *out == nullptr;
}
int aclrtMallocHost(void** out, size_t bytes) {
  *out = std::malloc(bytes);
  return *out == nullptr;
}
int aclrtFree(void*) { return 0; }  // the model goes on knowing the range
int aclrtFreeHost(void* memory) {
  std::free(memory);
  return 0;
}
int aclrtMemcpy(void* to, size_t, const void* from, size_t bytes, int) {
  std::memmove(to, from, bytes);
  return 0;
}
int aclrtMemcpyAsync(void* to, size_t, const void* from, size_t bytes, int, void*) {
  std::memmove(to, from, bytes);
  return 0;
}
int aclrtMemset(void* to, size_t, int32_t value, size_t bytes) {
  std::memset(to, value, bytes);
  return 0;
}

static int new_handle(void** out) {
  *out = reinterpret_cast<void*>(static_cast<intptr_t>(0x1000 + 16 * ++stream_count));
  return 0;
}
int aclrtCreateStream(void** out) { return new_handle(out); }
int aclrtCreateStreamWithConfig(void** out, uint32_t, uint32_t) { return new_handle(out); }
int aclrtCreateEventExWithFlag(void** out, uint32_t) { return new_handle(out); }

int aclopCompileAndExecute(const char*, ...) { return 500002; }  // the chip's own operators
}
