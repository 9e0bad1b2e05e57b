# SPDX-License-Identifier: Apache-2.0
# Installs the headers, the package for find_package(tally), and the programs that were built.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package ${CMAKE_INSTALL_LIBDIR}/cmake/tally)
install(TARGETS tally tally_nvtx EXPORT tally-targets FILE_SET HEADERS DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT tally-targets NAMESPACE tally:: DESTINATION ${package})
foreach(component ${components})
  install(TARGETS tally_${component} EXPORT tally-${component}-targets FILE_SET HEADERS DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
  install(EXPORT tally-${component}-targets NAMESPACE tally:: DESTINATION ${package})
endforeach()
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/tally-config.cmake.in ${PROJECT_BINARY_DIR}/tally-config.cmake INSTALL_DESTINATION ${package})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/tally-config-version.cmake COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES ${PROJECT_BINARY_DIR}/tally-config.cmake ${PROJECT_BINARY_DIR}/tally-config-version.cmake ${PROJECT_SOURCE_DIR}/cmake/Findpmix.cmake ${PROJECT_SOURCE_DIR}/cmake/Findrdma.cmake DESTINATION ${package})

foreach(program tally_perf tally_calibrate tally_report)
  if(TARGET ${program})
    install(TARGETS ${program} RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
  endif()
endforeach()
