# Module _cuda: every kernel family, its launchers, and the handlers of platform "CUDA".
message(STATUS "jax_flash2: nvcc ${CMAKE_CUDA_COMPILER_VERSION} compiles for ${JAX_FLASH2_CUDA_ARCHS}")

set(kernel_warnings -Xcompiler=-Wall,-Wextra -Xptxas=-warn-spills)
if(JAX_FLASH2_WERROR)
  list(APPEND kernel_warnings -Werror=all-warnings -Xcompiler=-Werror -Xptxas=-Werror)
endif()

# A family of kernels that share a list of architectures. Each family is compiled once, into objects
# that go into the one module.
function(add_kernels name)
  cmake_parse_arguments(PARSE_ARGV 1 ARG "" "" "ARCHS;SOURCES")
  add_library(${name} OBJECT ${ARG_SOURCES})
  set_target_properties(${name} PROPERTIES
    CUDA_ARCHITECTURES "${ARG_ARCHS}"
    CUDA_STANDARD 20
    CUDA_STANDARD_REQUIRED ON
    CUDA_VISIBILITY_PRESET hidden)
  target_link_libraries(${name} PRIVATE jax_flash2_common)
  target_include_directories(${name} SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  target_compile_options(${name} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:
    --expt-relaxed-constexpr --threads=2
    -Xfatbin=-compress-all --compress-mode=size ${kernel_warnings}>)
  target_sources(_cuda PRIVATE $<TARGET_OBJECTS:${name}>)
endfunction()

# One translation unit a launcher and head dim (those given last), generated: short compiles, and two
# cores share the work. cuda/launch/<launcher>_instance.cuh defines the template launch_<launcher>
# that it instantiates.
function(generate_instances launcher problem result)
  set(sources "")
  foreach(head_dim IN LISTS ARGN)
    set(source ${CMAKE_CURRENT_BINARY_DIR}/generated/${launcher}_hd${head_dim}.cu)
    file(CONFIGURE OUTPUT ${source} @ONLY CONTENT [[
#include "launch/@launcher@_instance.cuh"

template jax_flash2::Status jax_flash2::gpu::launch_@launcher@<@head_dim@>(
    const jax_flash2::@problem@&, cudaStream_t);
]])
    list(APPEND sources ${source})
  endforeach()
  set(${result} ${sources} PARENT_SCOPE)
endfunction()

nanobind_add_module(_cuda STABLE_ABI NB_STATIC NOMINSIZE
  cuda/ffi/cuda_module.cc cuda/ffi/decode.cc cuda/ffi/devices.cc)
target_link_libraries(_cuda PRIVATE jax_flash2_common)
target_include_directories(_cuda SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
set_target_properties(_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
# The static runtime's own symbols stay inside too.
target_link_options(_cuda PRIVATE -Wl,--exclude-libs,ALL)

# The mma.sync kernels, for every GPU since Ampere, and what chooses between the families.
generate_instances(forward ForwardProblem forward_sources ${JAX_FLASH2_HEAD_DIMS})
generate_instances(backward BackwardProblem backward_sources ${JAX_FLASH2_HEAD_DIMS})
generate_instances(decode DecodeProblem decode_sources ${JAX_FLASH2_DECODE_HEAD_DIMS})
file(GLOB launch_sources CONFIGURE_DEPENDS cuda/launch/*.cu cuda/launch/*.cc)
add_kernels(kernels_sm80 ARCHS ${JAX_FLASH2_CUDA_ARCHS}
            SOURCES ${launch_sources} ${forward_sources} ${backward_sources} ${decode_sources})

# The wgmma kernels, which only sm_90a can run. jax_flash2_config.h: kHasSm90.
if(JAX_FLASH2_HAS_SM90)
  generate_instances(forward_sm90 ForwardProblem forward_sm90_sources ${JAX_FLASH2_HEAD_DIMS})
  generate_instances(backward_sm90 BackwardProblem backward_sm90_sources ${JAX_FLASH2_HEAD_DIMS})
  generate_instances(decode_sm90 DecodeProblem decode_sm90_sources ${JAX_FLASH2_DECODE_HEAD_DIMS})
  add_kernels(kernels_sm90 ARCHS 90a-real
              SOURCES ${forward_sm90_sources} ${backward_sm90_sources} ${decode_sm90_sources})
endif()

install(TARGETS _cuda LIBRARY DESTINATION jax_flash2)
