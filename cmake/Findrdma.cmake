# SPDX-License-Identifier: Apache-2.0
# rdma::rdma: libibverbs and librdmacm (rdma-core), which bring no CMake package of their own.
include(FindPackageHandleStandardArgs)
find_path(rdma_INCLUDE_DIR rdma/rdma_cma.h)
find_library(rdma_VERBS_LIBRARY ibverbs)
find_library(rdma_CM_LIBRARY rdmacm)
mark_as_advanced(rdma_INCLUDE_DIR rdma_VERBS_LIBRARY rdma_CM_LIBRARY)
find_package_handle_standard_args(rdma REQUIRED_VARS rdma_CM_LIBRARY rdma_VERBS_LIBRARY rdma_INCLUDE_DIR)
if(rdma_FOUND AND NOT TARGET rdma::rdma)
  add_library(rdma::rdma INTERFACE IMPORTED)
  target_include_directories(rdma::rdma INTERFACE ${rdma_INCLUDE_DIR})
  target_link_libraries(rdma::rdma INTERFACE ${rdma_CM_LIBRARY} ${rdma_VERBS_LIBRARY})
endif()
