#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace atomas {

void run_tasks(int64_t count, int threads, Task task, const void* context) {
  std::atomic<int64_t> next{0};
  auto work = [&](int64_t worker) {
    for (int64_t index = next++; index < count; index = next++) task(context, worker, index);
  };
  std::vector<std::thread> helpers;
  const int64_t wanted = std::min<int64_t>(threads, count) - 1;
  try {
    for (int64_t worker = 1; worker <= wanted; ++worker) helpers.emplace_back(work, worker);
  } catch (const std::system_error&) {
    // No more threads to be had: those that run, and this one, finish the work.
  }
  work(0);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace atomas
