// Names of the errors that the operators return.

#include "common.h"

ATOMAS_OPERATOR const char* atomas_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
