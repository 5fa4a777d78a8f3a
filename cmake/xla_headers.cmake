# The FFI headers come from jaxlib, of the oldest supported version (pyproject.toml): a module built
# with newer headers than the jaxlib it meets at run time would be refused by XLA. find_spec does not
# import jaxlib, which would need numpy and seconds.
if(NOT JAX_FLASH2_XLA_INCLUDE)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.util as u; print(u.find_spec('jaxlib').submodule_search_locations[0])"
    OUTPUT_VARIABLE jaxlib_dir OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_VARIABLE error)
  if(NOT jaxlib_dir)
    message(FATAL_ERROR "jax_flash2: no jaxlib for ${Python_EXECUTABLE}: install jaxlib==0.10.2 "
                        "or point JAX_FLASH2_XLA_INCLUDE at its include folder. ${error}")
  endif()
  set(JAX_FLASH2_XLA_INCLUDE "${jaxlib_dir}/include")
endif()
if(NOT EXISTS "${JAX_FLASH2_XLA_INCLUDE}/xla/ffi/api/ffi.h")
  message(FATAL_ERROR "jax_flash2: no xla/ffi/api/ffi.h in ${JAX_FLASH2_XLA_INCLUDE}")
endif()
