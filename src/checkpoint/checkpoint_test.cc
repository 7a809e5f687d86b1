#include "checkpoint/checkpoint.h"

#include <gtest/gtest.h>
