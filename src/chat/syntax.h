// A parsed template: statements and the expressions in them. Built by parser.h, never changed after
// that, walked by interpreter.h.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "chat/operators.h"  // Operator
#include "chat/value.h"      // Value

namespace winnow::chat {

enum class ExprKind {
  kConstant,
  kName,
  kList,
  kTuple,
  kDict,       // operands: key, value, key, value ...
  kAttribute,  // operands: object
  kSubscript,  // operands: object, key
  kSlice,      // operands: object, start, stop, step; null where left out
  kCall,       // operands: callee, then the arguments
  kFilter,     // operands: value (null: the text of a filter block), then the arguments
  kTest,       // operands: value, then the arguments
  kNot,
  kNegate,
  kPlus,
  kAnd,  // two or more operands, as for the three below
  kOr,
  kConcat,
  kArithmetic,  // one operator between each two operands, from left to right
  kCompare,     // a < b < c: all must hold
  kConditional  // operands: value, condition, otherwise (may be null)
};

struct Expr;
using ExprPtr = std::unique_ptr<Expr>;

struct Expr {
  ExprKind kind = ExprKind::kConstant;
  int line = 0;
  int depth = 1;          // levels of expressions below, with this one
  std::string name = {};  // of kName, kAttribute, kFilter, kTest
  Value constant = {};
  std::vector<ExprPtr> operands = {};
  std::vector<Operator> operators = {};
  std::vector<std::pair<std::string, ExprPtr>> named = {};  // named arguments
};

enum class StatementKind {
  kText,
  kPrint,
  kIf,
  kFor,
  kSet,
  kSetBlock,
  kMacro,
  kWith,
  kFilterBlock,
  kGeneration,
  kBreak,
  kContinue
};

struct Statement;
using Block = std::vector<std::unique_ptr<Statement>>;

// `a`, `a, b` or `space.attribute`.
struct Target {
  std::vector<std::string> names;
  bool is_tuple = false;
  std::string attribute = {};
};

struct Branch {
  ExprPtr condition;
  Block body;
};

// A parameter of a macro, or a variable of `with`.
struct Parameter {
  std::string name;
  ExprPtr value;  // of a macro: the default, or null
};

struct Statement {
  StatementKind kind = StatementKind::kText;
  int line = 0;
  std::string text = {};   // of kText; the name of a kMacro
  ExprPtr value = {};      // printed, assigned, iterated over, or the filters of a block
  ExprPtr condition = {};  // `for ... if condition`
  Target target = {};
  std::vector<Branch> branches = {};  // if and elif
  std::vector<Parameter> parameters = {};
  Block body = {};
  Block otherwise = {};  // else of if and for
};

}  // namespace winnow::chat
