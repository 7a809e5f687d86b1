# winnow_library(folder SOURCES ... LINKS ...): one static library per folder of src/.
# winnow_test(name SOURCES ... LINKS ...): a GoogleTest executable registered with CTest.
# winnow_fuzz(name SOURCE ... LINKS ...): a libFuzzer executable (preset fuzz) that CTest also replays over its seeds.
include(CTest)

add_library(winnow_options INTERFACE)
target_compile_options(winnow_options INTERFACE -Wall -Wextra -Wshadow -Wnon-virtual-dtor
  -Wold-style-cast -Wcast-align -Woverloaded-virtual -Wconversion -Wno-sign-conversion
  -Wdouble-promotion -Wformat=2 -Werror -ffp-contract=off)
# GCC 12 reports false overlaps inside std::string (GCC bug 105651).
target_compile_options(winnow_options INTERFACE $<$<CXX_COMPILER_ID:GNU>:-Wno-restrict>)
target_include_directories(winnow_options INTERFACE ${PROJECT_SOURCE_DIR}/src)
if(WINNOW_SANITIZE)
  target_compile_options(winnow_options INTERFACE -fsanitize=${WINNOW_SANITIZE} -fno-omit-frame-pointer
    -fno-sanitize-recover=all)
  target_link_options(winnow_options INTERFACE -fsanitize=${WINNOW_SANITIZE})
endif()

# GoogleTest's macros expand to conversions that -Wconversion dislikes. What is tested is optimised
# as ever, the tests are not; at -O1 GCC 12 also reports false overruns inside std::string. Linked
# after winnow_options: the last of two options counts.
add_library(winnow_test_flags INTERFACE)
target_compile_options(winnow_test_flags INTERFACE -Wno-conversion -Wno-double-promotion -O1
  $<$<CXX_COMPILER_ID:GNU>:-Wno-array-bounds -Wno-stringop-overflow>)

function(winnow_library folder)
  cmake_parse_arguments(ARG "" "" "SOURCES;LINKS;PRIVATE_LINKS" ${ARGN})
  add_library(winnow_${folder} STATIC ${ARG_SOURCES})
  if(WINNOW_SANITIZE AND folder MATCHES "^(kernels|quantize)$")
    # Where nearly all of the time of the slowest tests goes.
    target_compile_options(winnow_${folder} PRIVATE -O2)
  endif()
  target_link_libraries(winnow_${folder} PUBLIC winnow_options ${ARG_LINKS} PRIVATE ${ARG_PRIVATE_LINKS})
endfunction()

# Compiles like every test, so that all of them share its precompiled headers: parsing GoogleTest and
# JSON again in each would be half of the build.
function(winnow_test_options name)
  target_link_libraries(${name} PRIVATE winnow_options winnow_test_flags fmt::fmt GTest::gtest_main)
  target_compile_definitions(${name} PRIVATE WINNOW_TEST_DATA="${PROJECT_SOURCE_DIR}/tests/data"
    WINNOW_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
endfunction()

function(winnow_test name)
  if(NOT WINNOW_TESTS)
    return()
  endif()
  if(NOT TARGET winnow_test_headers)
    file(WRITE ${PROJECT_BINARY_DIR}/test_headers.cc "")
    add_executable(winnow_test_headers EXCLUDE_FROM_ALL ${PROJECT_BINARY_DIR}/test_headers.cc)
    winnow_test_options(winnow_test_headers)
    target_precompile_headers(winnow_test_headers PRIVATE <gtest/gtest.h> <fmt/format.h>
      "${PROJECT_SOURCE_DIR}/src/base/json.h")
  endif()
  cmake_parse_arguments(ARG "" "" "SOURCES;LINKS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  winnow_test_options(${name})
  target_link_libraries(${name} PRIVATE ${ARG_LINKS})
  target_precompile_headers(${name} REUSE_FROM winnow_test_headers)
  add_test(NAME ${name} COMMAND ${name})
endfunction()

function(winnow_fuzz name)
  if(NOT WINNOW_FUZZ)
    return()
  endif()
  cmake_parse_arguments(ARG "" "" "SOURCES;LINKS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE winnow_options ${ARG_LINKS})
  target_link_options(${name} PRIVATE -fsanitize=fuzzer)
endfunction()
