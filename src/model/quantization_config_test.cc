#include "model/quantization_config.h"
