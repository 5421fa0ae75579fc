# Compiles csrc/kernels/weighted_sum_isa.cpp once for each instruction set, into the core; which one runs is decided on
# the machine it runs on. Sets kernel_variants, for the summary. HVD_BACKUP_KERNEL_VARIANTS tells the dispatcher whether
# there are any beside the baseline.

include(CheckCXXCompilerFlag)

function(add_kernel_variant isa)
  add_library(kernel_${isa} OBJECT csrc/kernels/weighted_sum_isa.cpp)
  target_link_libraries(kernel_${isa} PRIVATE hvd_backup_flags)
  target_compile_definitions(kernel_${isa} PRIVATE HVD_BACKUP_ISA=${isa})
  target_compile_options(kernel_${isa} PRIVATE ${ARGN})
  target_sources(hvd_backup_core PRIVATE $<TARGET_OBJECTS:kernel_${isa}>)
endfunction()

set(avx2_flags -mavx2 -mf16c)
set(avx512_flags -mavx512f -mavx512bw -mavx512vl -mavx512dq ${avx2_flags})

set(kernel_variants "none beside the baseline")
set(have_simd OFF)
if(NOT HVD_BACKUP_WITH_SIMD STREQUAL "OFF" AND CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  string(REPLACE ";" " " flags "${avx512_flags}")
  check_cxx_compiler_flag("${flags}" HVD_BACKUP_COMPILER_HAS_AVX512)
  set(have_simd ${HVD_BACKUP_COMPILER_HAS_AVX512})
endif()
if(HVD_BACKUP_WITH_SIMD STREQUAL "ON" AND NOT have_simd)
  message(FATAL_ERROR
    "HVD_BACKUP_WITH_SIMD=ON, but this is ${CMAKE_SYSTEM_PROCESSOR} with ${CMAKE_CXX_COMPILER_ID} "
    "${CMAKE_CXX_COMPILER_VERSION}: the kernels need x86-64 and a compiler that knows ${avx512_flags}.\n"
    "Use HVD_BACKUP_WITH_SIMD=AUTO (the default) to build with the baseline alone.")
endif()

add_kernel_variant(baseline)
if(have_simd)
  add_kernel_variant(avx2 ${avx2_flags})
  add_kernel_variant(avx512 ${avx512_flags})
  set(kernel_variants "AVX2, AVX-512")
endif()
target_compile_definitions(hvd_backup_core PRIVATE HVD_BACKUP_KERNEL_VARIANTS=$<BOOL:${have_simd}>)
