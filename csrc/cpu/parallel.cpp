#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace atomas {
namespace {

struct Tasks {
  int64_t count;
  Task task;
  const void* context;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> workers{0};
};

void work(void* given) {
  Tasks& tasks = *static_cast<Tasks*>(given);
  const int64_t worker = tasks.workers++;
  for (int64_t index = tasks.next++; index < tasks.count; index = tasks.next++) tasks.task(tasks.context, worker, index);
}

using Team = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

std::atomic<bool> forked{false};

// The OpenMP runtime that is in the process already, torch's: its threads spin for a while after each of torch's own
// loops, and threads beside them would wait for a core. None without it, and in the child of a fork, where the threads
// that it remembers do not exist.
Team openmp_team() {
  static const Team found = [] {
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    return reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  }();
  return forked ? nullptr : found;
}

void run_on_threads_of_its_own(Tasks& tasks, int64_t threads) {
  std::vector<std::thread> helpers;
  try {
    for (int64_t helper = 1; helper < threads; ++helper) helpers.emplace_back(work, &tasks);
  } catch (const std::system_error&) {
    // No more threads to be had: those that run, and this one, finish the work.
  }
  work(&tasks);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

void run_tasks(int64_t count, int threads, Task task, const void* context) {
  Tasks tasks{count, task, context};
  const int64_t wanted = std::min<int64_t>(threads, count);
  if (wanted <= 1) {
    work(&tasks);
  } else if (const Team team = openmp_team()) {
    team(work, &tasks, static_cast<unsigned>(wanted), 0);
  } else {
    run_on_threads_of_its_own(tasks, wanted);
  }
}

}  // namespace atomas
