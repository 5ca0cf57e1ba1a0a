# nvcc for the kernels in model/ops/cuda/. Everything else, and all linking, stays with g++.

# Architectures: TORCH_CUDA_ARCH_LIST, as PyTorch reads it ("8.0;9.0+PTX"); else code for Ampere (which Ada runs too) and
# Hopper, and PTX of the latter, which the driver compiles for whatever comes after.
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
  if(NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
    string(REGEX REPLACE "[ ,]+" ";" listed "$ENV{TORCH_CUDA_ARCH_LIST}")
    set(CMAKE_CUDA_ARCHITECTURES)
    foreach(item IN LISTS listed)
      if(NOT item MATCHES "^([0-9]+)\\.([0-9][af]?)(\\+PTX)?$" OR CMAKE_MATCH_1 LESS 8)
        message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: expected numbers from 8.0 on, as \"8.0;9.0+PTX\", got \"${item}\"")
      endif()
      if(CMAKE_MATCH_3)
        list(APPEND CMAKE_CUDA_ARCHITECTURES ${CMAKE_MATCH_1}${CMAKE_MATCH_2})
      else()
        list(APPEND CMAKE_CUDA_ARCHITECTURES ${CMAKE_MATCH_1}${CMAKE_MATCH_2}-real)
      endif()
    endforeach()
  endif()
endif()
if(NOT CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER ${CUDAToolkit_NVCC_EXECUTABLE})
endif()
# The runtime is linked below: the shared one, which LibTorch uses too.
set(CMAKE_CUDA_RUNTIME_LIBRARY None)
set(CMAKE_CUDA_COMPILER_LAUNCHER ${CALDERA_CCACHE})
enable_language(CUDA)

# caldera_kernels(NAME): adds NAME/ops/cuda/*.cu to the library NAME.
function(caldera_kernels name)
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/${name}/ops/cuda/*.cu)
  add_library(${name}_kernels OBJECT ${sources})
  # The options of the other targets are g++'s; the kernels see no header of LibTorch's.
  set_target_properties(${name}_kernels PROPERTIES COMPILE_OPTIONS "" CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON)
  target_include_directories(${name}_kernels PRIVATE ${CMAKE_SOURCE_DIR})
  target_sources(${name} PRIVATE $<TARGET_OBJECTS:${name}_kernels>)
  # The runtime that LibTorch brings, if it is of this toolkit's version: then the program needs no toolkit where it runs.
  # By its file: the target CUDA::cudart would add the toolkit's headers in front of all others.
  get_filename_component(site_packages ${LIBTORCH} DIRECTORY)
  file(GLOB cudart ${site_packages}/nvidia/*/lib/libcudart.so.${CUDAToolkit_VERSION_MAJOR})
  list(APPEND cudart ${CUDA_cudart_LIBRARY})
  list(GET cudart 0 cudart)
  target_link_libraries(${name} PUBLIC ${cudart})
endfunction()
