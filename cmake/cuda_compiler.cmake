# Decides whether there is a CUDA part, and enables CUDA if so. Sets JAX_FLASH2_CUDA_SKIPPED to the
# reason if not, and JAX_FLASH2_CUDA_ARCHS to what is compiled for.
#
#   JAX_FLASH2_CUDA = auto | on | off     auto: if there is an nvcc
#   JAX_FLASH2_NVCC = pypi                environment only: the nvcc of NVIDIA's wheels, which
#                                         pyproject.toml then makes build requirements
#   JAX_FLASH2_CUDA_ARCHS                 native (the GPUs in this machine; what it is if there are
#                                         any), default, all, or a list such as "80-real;90-real"
set(min_nvcc_version 12.8)  # the first with --compress-mode
set(default_archs 80-real 90-real 80-virtual)
set(all_archs 80-real 86-real 89-real 90-real 80-virtual)

string(TOLOWER "${JAX_FLASH2_CUDA}" mode)
if(NOT mode MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "JAX_FLASH2_CUDA should be auto, on or off, got '${JAX_FLASH2_CUDA}'")
endif()

# Points CMake at the nvcc of the five wheels, in site-packages/nvidia/cu13. They have lib/ where
# nvcc and CMake look in lib64/.
function(use_nvcc_from_pypi)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.util as u; print(*u.find_spec('nvidia').submodule_search_locations, sep=';')"
    OUTPUT_VARIABLE roots OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  list(TRANSFORM roots APPEND /cu13/bin OUTPUT_VARIABLE bins)
  find_program(JAX_FLASH2_PYPI_NVCC nvcc PATHS ${bins} NO_DEFAULT_PATH)
  if(NOT JAX_FLASH2_PYPI_NVCC)
    message(FATAL_ERROR "JAX_FLASH2_NVCC=pypi, but ${Python_EXECUTABLE} sees no nvcc from PyPI. "
      "`pip install .` fetches it; without build isolation install it first: "
      "pip install nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime "
      "nvidia-cuda-cccl, all ==13.0.*")
  endif()
  cmake_path(GET JAX_FLASH2_PYPI_NVCC PARENT_PATH bin)
  cmake_path(GET bin PARENT_PATH root)
  set(ENV{CUDACXX} "${JAX_FLASH2_PYPI_NVCC}")
  set(ENV{LIBRARY_PATH} "${root}/lib:$ENV{LIBRARY_PATH}")
  add_link_options("-L${root}/lib")
endfunction()

set(JAX_FLASH2_CUDA_SKIPPED "")
if(mode STREQUAL off)
  set(JAX_FLASH2_CUDA_SKIPPED "JAX_FLASH2_CUDA=off")
else()
  if("$ENV{JAX_FLASH2_NVCC}" STREQUAL pypi)
    use_nvcc_from_pypi()
  elseif(NOT "$ENV{JAX_FLASH2_NVCC}" STREQUAL "")
    message(FATAL_ERROR "JAX_FLASH2_NVCC should be unset or pypi, got '$ENV{JAX_FLASH2_NVCC}'; "
                        "CUDACXX names an nvcc by its path")
  elseif("$ENV{CUDACXX}" STREQUAL "")
    # The toolkit's own installer does not put nvcc on PATH.
    find_program(JAX_FLASH2_SYSTEM_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH
                 PATHS /usr/local/cuda PATH_SUFFIXES bin)
    if(JAX_FLASH2_SYSTEM_NVCC)
      set(ENV{CUDACXX} "${JAX_FLASH2_SYSTEM_NVCC}")
    endif()
  endif()

  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)  # an earlier run's "not found"
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(JAX_FLASH2_CUDA_SKIPPED "no working CUDA compiler (nvcc) was found")
  else()
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES OFF)  # each target names its own
    endif()
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS min_nvcc_version)
      set(JAX_FLASH2_CUDA_SKIPPED "nvcc ${CMAKE_CUDA_COMPILER_VERSION} at ${CMAKE_CUDA_COMPILER} \
is older than ${min_nvcc_version}")
    endif()
  endif()
endif()

if(JAX_FLASH2_CUDA_SKIPPED AND mode STREQUAL on)
  message(FATAL_ERROR "JAX_FLASH2_CUDA=on, but ${JAX_FLASH2_CUDA_SKIPPED}. Either install the CUDA "
    "toolkit (>= ${min_nvcc_version}; PATH, CUDA_HOME or CUDACXX names its nvcc), or set "
    "JAX_FLASH2_NVCC=pypi, which takes the compiler from PyPI for the time of the build.")
endif()

# The GPUs of this machine as CMake architectures; empty without a driver.
function(native_archs result)
  set(archs "")
  find_program(JAX_FLASH2_NVIDIA_SMI nvidia-smi)
  if(JAX_FLASH2_NVIDIA_SMI)
    execute_process(COMMAND "${JAX_FLASH2_NVIDIA_SMI}" --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE output ERROR_QUIET)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" capabilities "${output}")
    foreach(capability IN LISTS capabilities)
      string(REPLACE "." "" arch ${capability})
      if(arch LESS 80)
        message(WARNING "jax_flash2 has no kernels for a GPU of compute capability ${capability}")
      else()
        list(APPEND archs ${arch}-real)
      endif()
    endforeach()
    list(REMOVE_DUPLICATES archs)
  endif()
  set(${result} "${archs}" PARENT_SCOPE)
endfunction()

set(archs "${JAX_FLASH2_CUDA_ARCHS}")
if(archs STREQUAL "" OR archs STREQUAL native)
  native_archs(found_archs)
  if(found_archs)
    set(archs "${found_archs}")
  elseif(archs STREQUAL native)
    message(FATAL_ERROR "JAX_FLASH2_CUDA_ARCHS=native, but nvidia-smi shows no GPU since Ampere")
  else()
    set(archs "${default_archs}")
  endif()
elseif(archs STREQUAL default)
  set(archs "${default_archs}")
elseif(archs STREQUAL all)
  set(archs "${all_archs}")
endif()
if(JAX_FLASH2_CUDA_SKIPPED)
  set(archs "")
endif()
# Is there code for Hopper, so that its own kernels are worth compiling?
set(JAX_FLASH2_HAS_SM90 false)
if(archs MATCHES "(^|;)90")
  set(JAX_FLASH2_HAS_SM90 true)
endif()
set(JAX_FLASH2_CUDA_ARCHS "${archs}")  # shadows the cache entry, which keeps what was asked for
