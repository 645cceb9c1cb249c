# Installs headers, libraries and what finds them: find_package(tlinformer) and pkg-config. Every
# path in there is relative, so the installed tree may be moved.
include(GNUInstallDirs)
set(libdir ${CMAKE_INSTALL_LIBDIR})
set(includedir ${CMAKE_INSTALL_INCLUDEDIR})
set(openmp ${OpenMP_CXX_FLAGS})
set(blas ${BLAS_LIBRARIES})
list(JOIN BLAS_LIBRARIES " " pc_blas)
if(cuda)
  get_filename_component(cublas_dir ${TLINFORMER_CUBLASLT} DIRECTORY)
  string(APPEND pc_blas " ${TLINFORMER_CUBLASLT} -lcudart")
endif()
file(RELATIVE_PATH to_prefix /${libdir}/cmake/tlinformer /)
file(RELATIVE_PATH pc_to_prefix /${libdir}/pkgconfig /)
foreach(file tlinformerConfig.cmake tlinformerConfigVersion.cmake tlinformer.pc)
  configure_file(${CMAKE_CURRENT_LIST_DIR}/${file}.in ${PROJECT_BINARY_DIR}/cmake/${file} @ONLY)
endforeach()

install(DIRECTORY csrc/include/ DESTINATION ${includedir})
install(TARGETS tlinformer ARCHIVE DESTINATION ${libdir})
if(TARGET tlinformer_shared)
  install(TARGETS tlinformer_shared LIBRARY DESTINATION ${libdir})
endif()
install(FILES ${PROJECT_BINARY_DIR}/cmake/tlinformerConfig.cmake
              ${PROJECT_BINARY_DIR}/cmake/tlinformerConfigVersion.cmake
        DESTINATION ${libdir}/cmake/tlinformer)
install(FILES ${PROJECT_BINARY_DIR}/cmake/tlinformer.pc DESTINATION ${libdir}/pkgconfig)
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
install(FILES csrc/third_party/nlohmann/LICENSE.MIT DESTINATION ${CMAKE_INSTALL_DOCDIR}/nlohmann)
