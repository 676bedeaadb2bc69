// The learning rate as a function of the step: a linear warm-up, then cosine, linear or constant.
#pragma once

#include <math.h>
#include <stdint.h>

#include "llmc/options.h"  // Options

// The learning rate of update k, from 1 to o.steps. With s = k - 1 and f the final fraction:
//   s < warmup:  lr (s + 1) / warmup
//   after it:    p = (s - warmup) / (steps - warmup), so p < 1: the last update is one step short of f
//     cosine     lr (f + (1 - f) (1 + cos(pi p)) / 2)
//     linear     lr (1 - (1 - f) p)
//     constant   lr
inline double scheduled_learning_rate(const Options& o, int64_t k) {
    const double lr = o.learning_rate, f = o.final_lr_fraction;
    const int64_t s = k - 1;
    if (s < o.warmup_steps) return lr * static_cast<double>(s + 1) / static_cast<double>(o.warmup_steps);
    const double p = static_cast<double>(s - o.warmup_steps) / static_cast<double>(o.steps - o.warmup_steps);
    if (o.schedule == "cosine") return lr * (f + (1 - f) * (1 + cos(M_PI * p)) / 2);
    if (o.schedule == "linear") return lr * (1 - (1 - f) * p);
    return lr;
}
