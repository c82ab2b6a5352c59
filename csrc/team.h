// What the entry points share: the instruction set in use, threads to deal work out to, and sizes that can be.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "internal.h"

namespace wr {

const Kernels &kernels();  // of the level in use

// Threads are those of somebody else's OpenMP runtime, so that no second pool spins on the same cores.
extern void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
extern int (*thread_number)();
extern int (*most_threads)();

constexpr int64_t BYTES_PER_THREAD = 64 * 1024;  // waking a thread costs as much as reading this

template <typename Work>
struct Team {
    const Work *work;
    int64_t count, threads;
    static void run(void *self) {
        auto team = static_cast<Team *>(self);
        int64_t me = thread_number();
        team->share(me);
    }
    void share(int64_t me) const { (*work)(count * me / threads, count * (me + 1) / threads); }
};

template <typename Work>
void deal_out(int64_t count, int64_t bytes, const Work &work) {
    int64_t threads = gomp_parallel ? most_threads() : 1;
    threads = std::min(threads, std::min(count, bytes / BYTES_PER_THREAD + 1));
    Team<Work> team{&work, count, threads};
    if (threads <= 1)
        work(0, count);
    else
        gomp_parallel(Team<Work>::run, &team, unsigned(threads), 0);
}

constexpr int64_t MOST = int64_t(1) << 40;  // numbers in an array: what is made of fewer is counted without overflow

// Whether an array of these sizes, none of them negative, can be.
inline bool fits(std::initializer_list<int64_t> sizes) {
    int64_t numbers = 1;
    for (int64_t size : sizes) {
        if (size > MOST / numbers) return false;
        numbers *= std::max<int64_t>(size, 1);
    }
    return true;
}

}  // namespace wr
