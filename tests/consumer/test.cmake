# cmake -DWAY=install|shared|static|add_subdirectory -DBUILD=<build folder> ... -P test.cmake
# "install" fills <build>/consumer/moved; the others make a project of their own use it.
cmake_minimum_required(VERSION 3.22)
set(work ${BUILD}/consumer)
get_filename_component(source ${CMAKE_CURRENT_LIST_DIR}/../.. ABSOLUTE)

function(run)
  execute_process(COMMAND ${ARGV} COMMAND_ERROR_IS_FATAL ANY)
endfunction()

if(WAY STREQUAL "install")
  file(REMOVE_RECURSE ${work})
  run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${work}/installed)
  file(RENAME ${work}/installed ${work}/moved)
  file(GLOB_RECURSE texts ${work}/moved/*.cmake ${work}/moved/*.pc)
  foreach(text ${texts})
    # BLAS and cuBLAS are found on this machine, wherever they lie, and named as they were found.
    file(READ ${text} lines)
    foreach(found IN ITEMS ${SCIPY_OPENBLAS} ${CUBLAS})
      string(REPLACE "${found}" "" lines "${lines}")
    endforeach()
    if(lines MATCHES "${BUILD}|${source}")
      message(FATAL_ERROR "${text} is tied to this machine: ${lines}")
    endif()
  endforeach()
  return()
endif()

set(options -G ${GENERATOR} -DCMAKE_CXX_COMPILER=${CXX} -DCMAKE_CXX_FLAGS=${FLAGS})
if(WAY STREQUAL "add_subdirectory")
  list(APPEND options -DTLINFORMER_SOURCE=${source} -DTLINFORMER_CUDA=OFF
       -DTLINFORMER_SCIPY_OPENBLAS=${SCIPY_OPENBLAS})
else()
  list(APPEND options -DCMAKE_PREFIX_PATH=${work}/moved -DKIND=${WAY})
endif()
run(${CMAKE_COMMAND} -S ${CMAKE_CURRENT_LIST_DIR} -B ${work}/${WAY} ${options})
if(NOT WAY STREQUAL "add_subdirectory")  # compiling the library once more would take too long
  run(${CMAKE_COMMAND} --build ${work}/${WAY})
  run(${work}/${WAY}/consumer ${source}/models/tlinformer-prose-8m)
endif()
