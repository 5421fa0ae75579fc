// A GPU for TensorFlow without one, as a plugin (TensorFlow's C API for such devices): so our ops run with their kernels
// for a GPU, and what they do to its memory is TensorFlow's own doing. Its memory is the host's, at addresses that have
// the bit `disguise` set, as csrc/bindings/testing_device.cpp takes them: whoever else uses them crashes. Everything has
// ended when it has begun. TensorFlow's other operations have no kernels for it and run on the CPU; it copies what they
// make. Compiled by tests/test_tensorflow_device.py.
#include <tensorflow/c/experimental/stream_executor/stream_executor.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

struct SP_Stream_st {};
struct SP_Event_st {};
struct SP_Timer_st {};

namespace {

constexpr std::uintptr_t disguise = std::uintptr_t{1} << 62;

void* disguised(void* address) { return reinterpret_cast<void*>(reinterpret_cast<std::uintptr_t>(address) | disguise); }
void* undisguised(const SP_DeviceMemoryBase* memory) {
  return reinterpret_cast<void*>(reinterpret_cast<std::uintptr_t>(memory->opaque) & ~disguise);
}
void* memory(std::uint64_t bytes) { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }

using Device = SP_Device;
using Memory = SP_DeviceMemoryBase;

void describe(SP_StreamExecutor& its) {
  its.struct_size = SP_STREAMEXECUTOR_STRUCT_SIZE;
  its.allocate = [](const Device*, std::uint64_t bytes, std::int64_t, Memory* made) {
    made->opaque = disguised(memory(bytes));
    made->size = bytes;
  };
  its.deallocate = [](const Device*, Memory* given) { std::free(undisguised(given)); };
  its.host_memory_allocate = [](const Device*, std::uint64_t bytes) { return memory(bytes); };
  its.host_memory_deallocate = [](const Device*, void* given) { std::free(given); };
  its.unified_memory_allocate = its.host_memory_allocate;
  its.unified_memory_deallocate = its.host_memory_deallocate;
  its.get_allocator_stats = [](const Device*, SP_AllocatorStats*) -> TF_Bool { return 0; };
  its.device_memory_usage = [](const Device*, std::int64_t* free, std::int64_t* total) -> TF_Bool {
    *free = *total = std::int64_t{1} << 30;
    return 1;
  };
  its.create_stream = [](const Device*, SP_Stream* made, TF_Status*) { *made = new SP_Stream_st; };
  its.destroy_stream = [](const Device*, SP_Stream given) { delete given; };
  its.create_stream_dependency = [](const Device*, SP_Stream, SP_Stream, TF_Status*) {};
  its.get_stream_status = [](const Device*, SP_Stream, TF_Status*) {};
  its.create_event = [](const Device*, SP_Event* made, TF_Status*) { *made = new SP_Event_st; };
  its.destroy_event = [](const Device*, SP_Event given) { delete given; };
  its.get_event_status = [](const Device*, SP_Event) { return SE_EVENT_COMPLETE; };
  its.record_event = [](const Device*, SP_Stream, SP_Event, TF_Status*) {};
  its.wait_for_event = [](const Device*, SP_Stream, SP_Event, TF_Status*) {};
  its.create_timer = [](const Device*, SP_Timer* made, TF_Status*) { *made = new SP_Timer_st; };
  its.destroy_timer = [](const Device*, SP_Timer given) { delete given; };
  its.start_timer = [](const Device*, SP_Stream, SP_Timer, TF_Status*) {};
  its.stop_timer = its.start_timer;
  its.memcpy_dtoh = [](const Device*, SP_Stream, void* to, const Memory* from, std::uint64_t bytes, TF_Status*) {
    std::memcpy(to, undisguised(from), bytes);
  };
  its.memcpy_htod = [](const Device*, SP_Stream, Memory* to, const void* from, std::uint64_t bytes, TF_Status*) {
    std::memcpy(undisguised(to), from, bytes);
  };
  its.memcpy_dtod = [](const Device*, SP_Stream, Memory* to, const Memory* from, std::uint64_t bytes, TF_Status*) {
    std::memcpy(undisguised(to), undisguised(from), bytes);
  };
  its.sync_memcpy_dtoh = [](const Device*, void* to, const Memory* from, std::uint64_t bytes, TF_Status*) {
    std::memcpy(to, undisguised(from), bytes);
  };
  its.sync_memcpy_htod = [](const Device*, Memory* to, const void* from, std::uint64_t bytes, TF_Status*) {
    std::memcpy(undisguised(to), from, bytes);
  };
  its.sync_memcpy_dtod = [](const Device*, Memory* to, const Memory* from, std::uint64_t bytes, TF_Status*) {
    std::memcpy(undisguised(to), undisguised(from), bytes);
  };
  its.block_host_for_event = [](const Device*, SP_Event, TF_Status*) {};
  its.block_host_until_done = [](const Device*, SP_Stream, TF_Status*) {};
  its.synchronize_all_activity = [](const Device*, TF_Status*) {};
  its.mem_zero = [](const Device*, SP_Stream, Memory* to, std::uint64_t bytes, TF_Status*) {
    std::memset(undisguised(to), 0, bytes);
  };
  its.memset = [](const Device*, SP_Stream, Memory* to, std::uint8_t value, std::uint64_t bytes, TF_Status*) {
    std::memset(undisguised(to), value, bytes);
  };
  its.memset32 = [](const Device*, SP_Stream, Memory*, std::uint32_t, std::uint64_t, TF_Status*) { std::abort(); };
  its.host_callback = [](const Device*, SP_Stream, SE_StatusCallbackFn, void*) -> TF_Bool { std::abort(); };
}

}  // namespace

extern "C" void TF_InitKernel() {}

extern "C" void SE_InitPlugin(SE_PlatformRegistrationParams* registered, TF_Status*) {
  SP_Platform& platform = *registered->platform;
  platform.struct_size = SP_PLATFORM_STRUCT_SIZE;
  platform.name = "DOUBLE";
  platform.type = "GPU";
  platform.use_bfc_allocator = 1;
  platform.force_memory_growth = 1;
  registered->destroy_platform = [](SP_Platform*) {};
  registered->destroy_platform_fns = [](SP_PlatformFns*) {};

  SP_PlatformFns& its = *registered->platform_fns;
  its.struct_size = SP_PLATFORM_FNS_STRUCT_SIZE;
  its.get_device_count = [](const SP_Platform*, int* count, TF_Status*) { *count = 1; };
  its.create_device = [](const SP_Platform*, SE_CreateDeviceParams* asked, TF_Status*) {
    *asked->device = {SP_DEVICE_STRUCT_SIZE, nullptr, asked->ordinal, nullptr, "double", "none", "0"};
  };
  its.destroy_device = [](const SP_Platform*, Device*) {};
  its.create_device_fns = [](const SP_Platform*, SE_CreateDeviceFnsParams* asked, TF_Status*) {
    asked->device_fns->struct_size = SP_DEVICE_FNS_STRUCT_SIZE;
    asked->device_fns->get_numa_node = [](const Device*) -> std::int32_t { return 0; };
    asked->device_fns->get_memory_bandwidth = [](const Device*) -> std::int64_t { return 1; };
    asked->device_fns->get_gflops = [](const Device*) { return 1.0; };
  };
  its.destroy_device_fns = [](const SP_Platform*, SP_DeviceFns*) {};
  its.create_stream_executor = [](const SP_Platform*, SE_CreateStreamExecutorParams* asked, TF_Status*) {
    describe(*asked->stream_executor);
  };
  its.destroy_stream_executor = [](const SP_Platform*, SP_StreamExecutor*) {};
  its.create_timer_fns = [](const SP_Platform*, SP_TimerFns*, TF_Status*) {};
  its.destroy_timer_fns = [](const SP_Platform*, SP_TimerFns*) {};
}
