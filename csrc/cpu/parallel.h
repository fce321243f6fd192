// Runs independent tasks on a few threads.
#pragma once

#include <cstdint>

namespace atomas {

using Task = void (*)(const void* context, int64_t worker, int64_t index);

// Calls task(context, worker, index) once for every index in [0, count), with worker in [0, threads). Tasks write to
// disjoint memory, so the result is the same for every number of threads. Tasks must not throw.
void run_tasks(int64_t count, int threads, Task task, const void* context);

}  // namespace atomas
