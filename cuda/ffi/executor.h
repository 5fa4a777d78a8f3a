// XLA's thread pool as the CPU routines' executor.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>

#include "cpu/cpu.h"
#include "xla/ffi/api/ffi.h"

namespace jax_flash2::ffi {

class PoolExecutor final : public cpu::Executor {
 public:
  explicit PoolExecutor(xla::ffi::ThreadPool pool) : pool_(pool) {}

  int num_threads() const override {
    return static_cast<int>(std::clamp<int64_t>(pool_.num_threads(), 1, 1024));
  }

  // The calling thread may itself belong to the pool, and every other thread may be busy in the
  // same way: so it never waits for a task to *start*. It claims the bodies that nobody has claimed
  // yet, and waits only for those that a thread is already running.
  void run(int workers, const std::function<void(int)>& body) override {
    const auto job = std::make_shared<Job>(workers, body);
    for (int i = 1; i < workers; ++i) {
      pool_.Schedule([job] { job->help(); });
    }
    job->help();
    job->wait();
  }

 private:
  // Shared with the tasks, since one may start after run() has returned: it then finds nothing left
  // to claim, and touches nothing but the job itself.
  class Job {
   public:
    Job(int workers, const std::function<void(int)>& body) : workers_(workers), body_(body) {}

    void help() {
      for (int worker; (worker = next_.fetch_add(1)) < workers_;) {
        std::exception_ptr error;
        try {
          body_(worker);
        } catch (...) {
          error = std::current_exception();
        }
        const std::lock_guard lock(mutex_);
        if (error && !error_) error_ = error;
        if (++finished_ == workers_) all_finished_.notify_one();
      }
    }

    void wait() {
      std::unique_lock lock(mutex_);
      all_finished_.wait(lock, [this] { return finished_ == workers_; });
      if (error_) std::rethrow_exception(error_);
    }

   private:
    const int workers_;
    const std::function<void(int)>& body_;  // of the caller of run(), who waits for the last body
    std::atomic<int> next_ = 0;
    std::mutex mutex_;
    std::condition_variable all_finished_;
    int finished_ = 0;
    std::exception_ptr error_;
  };

  xla::ffi::ThreadPool pool_;
};

}  // namespace jax_flash2::ffi
