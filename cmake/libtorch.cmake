# LibTorch as imported targets, without its own CMake package (which demands a CUDA toolkit even for a CPU build):
#   torch::cpu      headers, c10 and torch_cpu
#   torch::runtime  the CUDA libraries, if any, which register themselves on load. Tests link them; the program opens them
#                   where there is a GPU (cli/main.cpp).
if(NOT LIBTORCH)
  file(GLOB wheel ${CMAKE_SOURCE_DIR}/.deps/venv/lib/python3*/site-packages/torch)
  if(NOT wheel)
    message(FATAL_ERROR "LibTorch not found: run scripts/setup.sh, or pass -DLIBTORCH=/path/to/torch")
  endif()
  list(GET wheel 0 LIBTORCH)
endif()
if(NOT EXISTS ${LIBTORCH}/lib/libtorch_cpu.so)
  message(FATAL_ERROR "LIBTORCH=${LIBTORCH} holds no lib/libtorch_cpu.so")
endif()

add_library(torch::cpu INTERFACE IMPORTED)
# -idirafter: the wheel brings its own fmt and protobuf headers; the system's must win.
target_compile_options(torch::cpu INTERFACE
  "SHELL:-idirafter ${LIBTORCH}/include" "SHELL:-idirafter ${LIBTORCH}/include/torch/csrc/api/include")
target_compile_definitions(torch::cpu INTERFACE AT_PER_OPERATOR_HEADERS)  # see base/aten.h
target_link_libraries(torch::cpu INTERFACE ${LIBTORCH}/lib/libtorch_cpu.so ${LIBTORCH}/lib/libc10.so)
target_link_options(torch::cpu INTERFACE -Wl,-rpath,${LIBTORCH}/lib -Wl,--allow-shlib-undefined)
add_library(torch::runtime INTERFACE IMPORTED)

set(use_cuda ${CALDERA_CUDA})
if(use_cuda STREQUAL "AUTO")
  find_package(CUDAToolkit QUIET)
  get_filename_component(site_packages ${LIBTORCH} DIRECTORY)
  file(GLOB cudnn ${site_packages}/nvidia/cudnn/lib/libcudnn.so.9 ${LIBTORCH}/lib/libcudnn.so.9)
  # A GPU, as scripts/setup.sh looks for one: a toolkit alone does not want CUDA.
  file(GLOB gpus /dev/nvidia[0-9]*)
  if(NOT gpus)
    execute_process(COMMAND nvidia-smi -L OUTPUT_VARIABLE gpus ERROR_QUIET)
    string(REGEX MATCH "GPU [0-9]+:" gpus "${gpus}")
  endif()
  set(use_cuda OFF)
  if(gpus AND CUDAToolkit_FOUND AND cudnn AND EXISTS ${LIBTORCH}/lib/libtorch_cuda.so)
    if(NOT DEFINED ENV{CUDACXX})
      set(ENV{CUDACXX} ${CUDAToolkit_NVCC_EXECUTABLE})
    endif()
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      set(use_cuda ON)
    endif()
  endif()
  if(gpus AND NOT use_cuda)
    message(WARNING "There is an NVIDIA GPU, which will not be used: a CUDA toolkit that works, or LibTorch's CUDA libraries, are "
                    "missing (scripts/setup.sh). -DCALDERA_CUDA=OFF is for the CPU only, without this warning.")
  endif()
endif()
if(use_cuda)
  find_package(CUDAToolkit REQUIRED)
  target_compile_definitions(torch::cpu INTERFACE CALDERA_CUDA=1)
  target_compile_options(torch::cpu INTERFACE "SHELL:-idirafter ${CUDAToolkit_INCLUDE_DIRS}")
  target_link_libraries(torch::cpu INTERFACE ${LIBTORCH}/lib/libc10_cuda.so)
  # Several ranks on GPUs: c10d's NCCL group, which LibTorch holds; of NCCL itself its header alone is needed.
  get_filename_component(site_packages ${LIBTORCH} DIRECTORY)
  find_path(NCCL_INCLUDE nccl.h HINTS ${site_packages}/nvidia/nccl/include ${CUDAToolkit_INCLUDE_DIRS})
  target_link_options(torch::runtime INTERFACE -Wl,--no-as-needed,${LIBTORCH}/lib/libtorch_cuda.so,--as-needed)
endif()
message(STATUS "LibTorch: ${LIBTORCH}, CUDA: ${use_cuda}")
