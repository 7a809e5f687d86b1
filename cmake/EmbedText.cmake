# cmake -DINPUT=file -DOUTPUT=file.cc -DHEADER=dir/header.h -DFUNCTION=Name -P EmbedText.cmake
# Writes `std::string_view winnow::Name()`, declared in HEADER, that returns the text of INPUT.
file(READ "${INPUT}" text)
string(LENGTH "${text}" length)
if(length GREATER 65000 OR text MATCHES "\\)embedded\"")
  message(FATAL_ERROR "${INPUT}: too long for one raw string, or it holds the string's end mark")
endif()
file(WRITE "${OUTPUT}" "// Made from a file of the source tree by cmake/EmbedText.cmake.
#include \"${HEADER}\"

namespace winnow {

std::string_view ${FUNCTION}() {
  return R\"embedded(${text})embedded\";
}

}  // namespace winnow
")
