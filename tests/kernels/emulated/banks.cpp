// How badly the accesses of a Linear to shared memory collide. A warp's access goes in parts of at most 128 bytes; a part
// whose bytes lie in different words of one bank takes as many turns as the fullest bank has words.
#include <map>
#include <set>

#include "linear.cu"

namespace {

using namespace mptqc;

// Where lane `lane` accesses `bytes` bytes, in bytes.
template <class Address>
int turns(int bytes, Address address) {
  const int lanes = 128 / bytes;
  int worst = 0;
  for (int first = 0; first < kWarp; first += lanes) {
    std::map<int, std::set<int>> words;
    for (int lane = first; lane < first + lanes; ++lane)
      for (int word = address(lane) / 4; word < (address(lane) + bytes) / 4; ++word) words[word % 32].insert(word);
    for (const auto& [bank, found] : words) worst = std::max(worst, static_cast<int>(found.size()));
  }
  return worst;
}

template <class T>
int worst_of() {
  using Block = LinearBlock<T, 16>;
  int worst = 0;
  const auto see = [&](int found) { worst = std::max(worst, found); };
  for (int warp = 0; warp < T::kThreads / kWarp; ++warp) {
    for (int i = 0; i < Copier<T, 16>::kRowCopies; ++i)
      see(turns(16, [&](int lane) {
        const int thread = warp * kWarp + lane;
        return left_chunk(thread / kLeftChunks + i * Copier<T, 16>::kRowsApart, thread % kLeftChunks) * kChunk;
      }));
    for (int i = 0; i < Copier<T, 16>::kBlockCopies; ++i)
      see(turns(16, [&](int lane) {
        const int thread = warp * kWarp + lane, block = thread / kDepth + i * Copier<T, 16>::kBlocksApart;
        return weight_chunk<T>(thread % kDepth / 4, 4 * block + thread % 4) * kChunk;
      }));
  }
  for (int step = 0; step < kDepth / kStep; ++step) {
    for (int row = 0; row < T::kRows; row += 16)
      see(turns(16, [&](int lane) {
        return left_chunk(row + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2) * kChunk;
      }));
    for (int quad = 0; quad < T::kColumns / 4; quad += 8)
      for (int p = 0; p < 2; ++p)
        see(turns(8, [&](int lane) {
          return weight_chunk<T>(8 * step + lane % 4, quad + lane / 4) * kChunk + (lane / 4 % 2 ^ p) * kChunk / 2;
        }));
  }
  for (int row = 0; row < T::kWarpRows; row += 8)
    for (int i = 0; i < 2 * 2 * T::kSpans; ++i)
      see(turns(8, [&](int lane) {
        const int quad = lane / 4, own = row + 2 * (lane % 4) + i % 2;
        return Block::sum_chunk(own, kSpan / 4 * (i / 4) + quad) * kChunk + (quad % 2 ^ i / 2 % 2) * kChunk / 2;
      }));
  constexpr int across = T::kWarpColumns / kLaneColumns;
  for (int row = 0; row < T::kWarpRows; row += kWarp / across)
    for (int half = 0; half < 2; ++half)
      see(turns(16, [&](int lane) { return Block::sum_chunk(row + lane / across, 2 * (lane % across) + half) * kChunk; }));
  return worst;
}

// How a group reads the weight, and puts sums where others find them.
template <class T>
int worst_of_group() {
  int worst = 0;
  for (int warp = 0; warp < 4; ++warp)
    for (int group = 0; group < T::kDepth / 4; group += 4)
      worst = std::max(worst, turns(16, [&](int lane) {
        return boxed_chunk<T::kDepth>(group + lane % 4, warp * 8 + quad_of(lane / 4)) * kChunk;
      }));
  return std::max(worst, turns(16, [](int lane) { return lane * kChunk; }));
}

}  // namespace

extern "C" MPTQC_EXPORT int worst_of_groups() {
  return std::max({worst_of_group<ManyRows>(), worst_of_group<SomeRows>(), worst_of_group<FewRows>()});
}
extern "C" MPTQC_EXPORT int worst_of_large_tile() { return worst_of<LargeTile>(); }
extern "C" MPTQC_EXPORT int worst_of_small_tile() { return worst_of<SmallTile>(); }
extern "C" MPTQC_EXPORT int worst_of_columns() { return turns(4, [](int lane) { return lane * 128; }); }
