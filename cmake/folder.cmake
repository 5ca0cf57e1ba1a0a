# caldera_folder(NAME FILES_AT_ONCE n LINK libs...): a static library of every .cpp below NAME/ (headers alone while there is
# none). What ends in _module.cpp becomes a library of its own, opened while the program runs.
function(caldera_folder name)
  cmake_parse_arguments(arg "" "FILES_AT_ONCE" "LINK" ${ARGN})
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/${name}/*.cpp)
  list(FILTER sources EXCLUDE REGEX "_module\\.cpp$")
  if(NOT sources)
    add_library(${name} INTERFACE)
    target_link_libraries(${name} INTERFACE ${arg_LINK})
    return()
  endif()
  add_library(${name} STATIC ${sources})
  target_include_directories(${name} PUBLIC ${CMAKE_SOURCE_DIR})
  target_link_libraries(${name} PUBLIC ${arg_LINK})
  caldera_unity(${name} ${arg_FILES_AT_ONCE})
endfunction()

# Joins so many files of a target for the compiler (CALDERA_UNITY): what file-local names then share must differ.
function(caldera_unity name files_at_once)
  set_target_properties(${name} PROPERTIES UNITY_BUILD ${CALDERA_UNITY} UNITY_BUILD_BATCH_SIZE ${files_at_once})
  if(CALDERA_UNITY)
    # It takes joined files for headers, whose local names no other file should see.
    target_compile_options(${name} PRIVATE -Wno-subobject-linkage)
  endif()
endfunction()

# caldera_optimize(LEVEL targets...): of release builds, for targets without hot loops.
function(caldera_optimize level)
  foreach(target IN LISTS ARGN)
    target_compile_options(${target} PRIVATE $<$<CONFIG:Release>:${level}>)
  endforeach()
endfunction()
