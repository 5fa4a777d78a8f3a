# How the host's files are compiled: the kernels once for each instruction set, the rest once.
# Appends to JAX_FLASH2_CPU_SOURCES.
set(JAX_FLASH2_CPU_KERNELS
  ${CMAKE_CURRENT_LIST_DIR}/forward.cc ${CMAKE_CURRENT_LIST_DIR}/backward.cc
  ${CMAKE_CURRENT_LIST_DIR}/decode.cc)

# The baseline comes first: should the linker ever merge an inline function, it keeps that one.
function(jax_flash2_cpu_kernels isa)
  add_library(jax_flash2_cpu_${isa} OBJECT ${JAX_FLASH2_CPU_KERNELS})
  target_link_libraries(jax_flash2_cpu_${isa} PRIVATE jax_flash2_common)
  target_compile_definitions(jax_flash2_cpu_${isa} PRIVATE JAX_FLASH2_CPU_ISA=${isa})
  target_compile_options(jax_flash2_cpu_${isa} PRIVATE -O3 -ffp-contract=fast ${ARGN})
  set(JAX_FLASH2_CPU_SOURCES
    ${JAX_FLASH2_CPU_SOURCES} $<TARGET_OBJECTS:jax_flash2_cpu_${isa}> PARENT_SCOPE)
endfunction()

jax_flash2_cpu_kernels(baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  jax_flash2_cpu_kernels(avx2 -mavx2 -mfma)
  set(avx512 -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl)
  jax_flash2_cpu_kernels(avx512 ${avx512})
  jax_flash2_cpu_kernels(avx512bf16 ${avx512} -mavx512bf16)
  set_property(SOURCE ${CMAKE_CURRENT_LIST_DIR}/attention.cc
               APPEND PROPERTY COMPILE_DEFINITIONS JAX_FLASH2_CPU_X86)
endif()
list(APPEND JAX_FLASH2_CPU_SOURCES ${CMAKE_CURRENT_LIST_DIR}/attention.cc)
