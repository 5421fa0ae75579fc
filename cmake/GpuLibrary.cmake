# The GPU library: a Python module of its own, hvd_backup/_gpu, so that the others need no CUDA. It links CUDA's runtime
# statically, and that finds the driver when it is first asked: it can be imported on a machine without a GPU. Sets
# gpu_library, for the summary.

include(CheckLanguage)

set(gpu_library "none: there is no nvcc on PATH, nor in CUDACXX")
set(have_gpu OFF)
if(HVD_BACKUP_GPU STREQUAL "OFF")
  set(gpu_library "none: HVD_BACKUP_GPU=OFF")
else()
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(chosen "${CMAKE_CUDA_ARCHITECTURES}")
    if(NOT chosen AND NOT DEFINED ENV{CUDAARCHS})
      set(CMAKE_CUDA_ARCHITECTURES 80-real 90) # or enable_language would fill in, and keep, what the compiler prefers
    endif()
    enable_language(CUDA)
    if(NOT chosen AND NOT DEFINED ENV{CUDAARCHS} AND CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
      set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100)
    endif()
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.1) # kernels with arguments of more than 4 KiB
      set(gpu_library "none: nvcc is of CUDA ${CMAKE_CUDA_COMPILER_VERSION}, 12.1 or later is needed")
    else()
      set(have_gpu ON)
    endif()
  endif()
  if(HVD_BACKUP_GPU STREQUAL "ON" AND NOT have_gpu)
    message(FATAL_ERROR "HVD_BACKUP_GPU=ON, but the GPU library would be ${gpu_library}.\n"
      "Put CUDA's nvcc on PATH (pip, conda, or NVIDIA's packages), or use HVD_BACKUP_GPU=AUTO (the default).")
  endif()
endif()

if(have_gpu OR HVD_BACKUP_TESTING) # it needs neither CUDA nor NCCL
  add_library(hvd_backup_nccl STATIC csrc/gpu/nccl.cpp)
  target_link_libraries(hvd_backup_nccl PRIVATE hvd_backup_flags ${CMAKE_DL_LIBS})
endif()
if(have_gpu)
  add_library(hvd_backup_gpu STATIC csrc/gpu/kernels.cu csrc/gpu/cuda_device.cu)
  target_include_directories(hvd_backup_gpu PUBLIC csrc)
  target_link_libraries(hvd_backup_gpu PRIVATE hvd_backup_nccl)
  # No fused multiply-add: the same bits as on the CPU.
  target_compile_options(hvd_backup_gpu PRIVATE --fmad=false "-Xcompiler=-Wall,-Wextra,-Wno-unknown-pragmas")
  set_target_properties(hvd_backup_gpu PROPERTIES
    CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Static)
  add_python_module(_gpu csrc/bindings/gpu.cpp)
  target_link_libraries(_gpu PRIVATE hvd_backup_gpu hvd_backup_nccl)
  list(JOIN CMAKE_CUDA_ARCHITECTURES ", " gpu_library)
  set(gpu_library "CUDA ${CMAKE_CUDA_COMPILER_VERSION}, for ${gpu_library}")
endif()
