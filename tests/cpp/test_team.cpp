// Teams of threads: every tile of every stage runs once, no stage begins before the last has ended, and late or absent
// threads change nothing.
#include <chrono>

#include "check.h"
#include "cpu/team.h"

using namespace bitinfer::cpu;

namespace {

constexpr int64_t kStages = 200;

// One thread may come late, or be told to dawdle within a tile.
void run(int64_t threads, bool late) {
  context = std::to_string(threads) + " threads" + (late ? ", one late" : "");
  const auto tiles_of = [](int64_t stage) { return stage % 7; };  // none, too, and fewer than threads
  std::vector<std::atomic<int>> runs(kStages * 7), ended(kStages);
  std::atomic<int> early = 0;
  Team team(kStages);
  const auto work = [&](int64_t thread) {
    if (late && thread == 0) std::this_thread::sleep_for(std::chrono::milliseconds(20));
    Team::Member member(team);
    for (int64_t stage = 0; stage < kStages; ++stage) {
      member.stage(tiles_of(stage), [&](int64_t tile) {
        if (stage > 0 && ended[stage - 1] != tiles_of(stage - 1)) ++early;
        if (late && stage % 50 == 3 && tile == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
        ++runs[stage * 7 + tile];
        ++ended[stage];
      });
    }
  };
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
  CHECK(early == 0);
  for (int64_t stage = 0; stage < kStages; ++stage) {
    for (int64_t tile = 0; tile < 7; ++tile) CHECK(runs[stage * 7 + tile] == (tile < tiles_of(stage) ? 1 : 0));
  }
}

}  // namespace

int main() {
  for (const int64_t threads : {1, 2, 3, 8}) {  // more than there are cores, too
    for (const bool late : {false, true}) run(threads, late);
  }
  return report();
}
