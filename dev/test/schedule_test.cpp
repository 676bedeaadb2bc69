// Proves that the learning rate is the design's formula: against values worked out by hand, and at every
// place where the shape changes.
//     make build/host/test/schedule_test && build/host/test/schedule_test
#include "llmc/schedule.h"

#include <gtest/gtest.h>

namespace {

// Values here need a handful of roundings, each within half of eps = 2.2e-16 of the value: 16 eps is a bound.
constexpr double kRelative = 16 * 2.220446049250313e-16;
#define EXPECT_RATE(o, k, wanted) \
    EXPECT_NEAR(scheduled_learning_rate(o, k), wanted, kRelative*(o).learning_rate)

Options options(const char* schedule) {
    Options o;
    o.schedule = schedule;
    o.learning_rate = 0.8;
    o.warmup_steps = 4;
    o.steps = 12;
    o.final_lr_fraction = 0.25;
    return o;
}

TEST(Schedule, WarmUpIsLinearAndReachesThePeakAtItsLastStep) {
    for (const char* schedule : {"cosine", "linear", "constant"}) {
        const Options o = options(schedule);
        EXPECT_RATE(o, 1, 0.2);
        EXPECT_RATE(o, 2, 0.4);
        EXPECT_RATE(o, 3, 0.6);
        EXPECT_RATE(o, 4, 0.8);
        EXPECT_RATE(o, 5, 0.8);  // s = warmup, p = 0: the peak once more
    }
}

TEST(Schedule, Cosine) {
    const Options o = options("cosine");
    EXPECT_RATE(o, 7, 0.8 * (0.25 + 0.75 * (1 + M_SQRT1_2) / 2));  // p = 1/4: cos(pi / 4)
    EXPECT_RATE(o, 9, 0.8 * (0.25 + 0.75 / 2));                    // p = 1/2
    EXPECT_RATE(o, 11, 0.8 * (0.25 + 0.75 * (1 - M_SQRT1_2) / 2));
    EXPECT_RATE(o, 12, 0.8 * (0.25 + 0.75 * (1 - cos(M_PI / 8)) / 2));  // p = 7/8: not quite the end
    EXPECT_RATE(o, 13, 0.8 * 0.25);                                     // where step 13 would be
}

TEST(Schedule, Linear) {
    const Options o = options("linear");
    EXPECT_RATE(o, 7, 0.8 * (1 - 0.75 * 0.25));
    EXPECT_RATE(o, 12, 0.8 * (1 - 0.75 * 0.875));
    EXPECT_RATE(o, 13, 0.8 * 0.25);
}

TEST(Schedule, Constant) {
    const Options o = options("constant");
    for (int64_t k = 4; k <= 12; k++) EXPECT_EQ(scheduled_learning_rate(o, k), 0.8);
}

TEST(Schedule, NeverLeavesZeroToPeakAndFallsAfterTheWarmUp) {
    for (const char* schedule : {"cosine", "linear", "constant"}) {
        for (int64_t warmup : {0, 1, 50, 100}) {
            for (double fraction : {0.0, 0.1, 1.0}) {
                Options o = options(schedule);
                o.warmup_steps = warmup;
                o.steps = 100;
                o.final_lr_fraction = fraction;
                double before = o.learning_rate;
                for (int64_t k = 1; k <= o.steps; k++) {
                    const double rate = scheduled_learning_rate(o, k);
                    EXPECT_GT(rate, 0);
                    EXPECT_LE(rate, o.learning_rate);
                    if (k > warmup) {
                        EXPECT_LE(rate, before);
                        before = rate;
                    }
                }
            }
        }
    }
}

TEST(Schedule, LongRunsKeepTheirPrecision) {
    Options o = options("linear");
    o.warmup_steps = 0;
    o.steps = 1000000000000000;
    EXPECT_RATE(o, 500000000000001, 0.8 * (1 - 0.75 * 0.5));
}

}  // namespace
