// Threads that go through a sequence of stages together, without leaving their parallel region in between.
//
// A stage is a number of tiles. Threads take tiles as they come, and none goes on before all tiles of the stage are
// done. How many threads take part need not be known: one alone does everything, one that comes late finds stages that
// are done, and one that the system holds up delays nothing but the tile that it has.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace bitinfer::cpu {

class Team {
  struct alignas(64) Stage {
    std::atomic<int64_t> next = 0, done = 0;
  };

 public:
  explicit Team(int64_t most_stages) : stages_(std::make_unique<Stage[]>(static_cast<size_t>(most_stages))) {}

  // A thread's place in the sequence. All threads run the same stages in the same order.
  class Member {
   public:
    explicit Member(Team& team) : stage_(team.stages_.get()) {}

    template <typename Tile>
    void stage(int64_t tiles, const Tile& tile) {
      Stage& now = *stage_++;
      for (int64_t i = take(now); i < tiles; i = take(now)) {
        tile(i);
        now.done.fetch_add(1, std::memory_order_release);
      }
      for (int64_t spins = 0; now.done.load(std::memory_order_acquire) < tiles; ++spins) {
        if (spins < kSpins) {
          pause();
        } else {  // the thread that has the tile may be waiting for this core
          std::this_thread::yield();
        }
      }
    }

   private:
    Stage* stage_;
  };

 private:
  static constexpr int64_t kSpins = 1 << 12;

  static int64_t take(Stage& stage) { return stage.next.fetch_add(1, std::memory_order_relaxed); }

  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#endif
  }

  std::unique_ptr<Stage[]> stages_;
};

}  // namespace bitinfer::cpu
