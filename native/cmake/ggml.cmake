# The ggml that the installed llama-cpp-python carries: GGML_INCLUDE, GGML_LINK, ggml_VERSION and
# LLAMA_CPP_DIR, for Python_EXECUTABLE.

# llama_cpp itself is not imported: its folder is enough, and importing needs the machine's libraries.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import importlib.util as u; print(u.find_spec('llama_cpp').submodule_search_locations[0])"
  OUTPUT_VARIABLE LLAMA_CPP_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
if(failed OR NOT EXISTS "${LLAMA_CPP_DIR}/lib")
  message(FATAL_ERROR "llama-cpp-python is not installed for ${Python_EXECUTABLE}. Install it first: `make setup` does.")
endif()
get_filename_component(SITE_PACKAGES "${LLAMA_CPP_DIR}" DIRECTORY)
find_package(ggml CONFIG REQUIRED PATHS "${SITE_PACKAGES}/lib/cmake/ggml" NO_DEFAULT_PATH)
set(GGML_INCLUDE "${SITE_PACKAGES}/include")

# The package's CMake files name the copies under site-packages/lib; what Python loads is llama_cpp/lib. Link
# with those, so that both find the same file.
set(GGML_LINK)
foreach(name llama ggml ggml-base ggml-cpu)
  find_library(LIB_${name} NAMES ${name} PATHS "${LLAMA_CPP_DIR}/lib" NO_DEFAULT_PATH REQUIRED)
  list(APPEND GGML_LINK "${LIB_${name}}")
endforeach()
