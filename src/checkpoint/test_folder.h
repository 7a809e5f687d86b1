// A temporary folder for tests of checkpoint/, removed afterwards.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <string>
#include <string_view>

#include "base/error.h"
#include "base/file.h"

namespace winnow {

class TestFolder {
 public:
  TestFolder() {
    std::string name = (fs::temp_directory_path() / "winnow_test_XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw RuntimeError("cannot create " + name);
    path_ = name;
  }
  ~TestFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  TestFolder(const TestFolder&) = delete;
  TestFolder& operator=(const TestFolder&) = delete;

  const fs::path& path() const { return path_; }
  fs::path Write(const std::string& name, std::string_view content) const {
    const fs::path path = path_ / name;
    fs::create_directories(path.parent_path());
    WriteFileAtomically(path, content);
    return path;
  }

 private:
  fs::path path_;
};

// The message of the ModelError that `action` must throw.
template <class Action>
std::string ModelErrorOf(Action action) {
  try {
    action();
  } catch (const ModelError& e) {
    return e.what();
  }
  ADD_FAILURE() << "expected a ModelError";
  return {};
}

}  // namespace winnow
