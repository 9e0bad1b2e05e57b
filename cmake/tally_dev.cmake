# SPDX-License-Identifier: Apache-2.0
# tally_dev: the library with the warnings and sanitizers that our own tests and programs are built with. Never
# exported: users choose their own.
add_library(tally_dev INTERFACE)
target_link_libraries(tally_dev INTERFACE tally::tally)
target_compile_options(tally_dev INTERFACE -Wall -Wextra -Wconversion -Wshadow -Wpedantic -Werror)

if(TALLY_SANITIZE STREQUAL "address")
  set(sanitizers -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
    list(APPEND sanitizers -fno-sanitize=function)  # Clang 14 cannot, in coroutines
  endif()
  target_compile_definitions(tally_dev INTERFACE _GLIBCXX_ASSERTIONS)
elseif(TALLY_SANITIZE STREQUAL "thread")
  set(sanitizers -fsanitize=thread -fno-omit-frame-pointer)
  # GCC warns that TSan does not model fences; a race that it reports for that reason shows up in the tests.
  target_compile_options(tally_dev INTERFACE $<$<CXX_COMPILER_ID:GNU>:-Wno-tsan>)
elseif(NOT TALLY_SANITIZE STREQUAL "")
  message(FATAL_ERROR "TALLY_SANITIZE is '${TALLY_SANITIZE}'; it can be address, thread or empty")
endif()
if(sanitizers)
  target_compile_options(tally_dev INTERFACE $<$<CXX_COMPILER_ID:GNU>:-Wno-array-bounds;-Wno-stringop-overflow;-Wno-maybe-uninitialized>)  # GCC 12 sees some in instrumented code that are none
endif()
target_compile_options(tally_dev INTERFACE ${sanitizers})
target_link_options(tally_dev INTERFACE ${sanitizers})
