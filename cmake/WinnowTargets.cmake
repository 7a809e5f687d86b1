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

function(winnow_library folder)
  cmake_parse_arguments(ARG "" "" "SOURCES;LINKS;PRIVATE_LINKS" ${ARGN})
  add_library(winnow_${folder} STATIC ${ARG_SOURCES})
  target_link_libraries(winnow_${folder} PUBLIC winnow_options ${ARG_LINKS} PRIVATE ${ARG_PRIVATE_LINKS})
endfunction()

function(winnow_test name)
  if(NOT WINNOW_TESTS)
    return()
  endif()
  cmake_parse_arguments(ARG "" "" "SOURCES;LINKS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE winnow_options ${ARG_LINKS} GTest::gtest_main)
  target_compile_definitions(${name} PRIVATE WINNOW_TEST_DATA="${PROJECT_SOURCE_DIR}/tests/data"
    WINNOW_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
  # GoogleTest's macros expand to conversions that -Wconversion dislikes.
  target_compile_options(${name} PRIVATE -Wno-conversion -Wno-double-promotion)
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
