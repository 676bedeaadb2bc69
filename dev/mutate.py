"""Plants bugs, one at a time, and runs the tests that should see them.

    python dev/mutate.py [--only WORD] [--results FILE.tsv] [--keep DIR] [--python .venv/bin/python]
    python dev/mutate.py --markdown [--results FILE.tsv]

A mutation is a text of a source file and what replaces it: a sign, an index, a scale, a dropped term. The
tree is copied into a temporary directory; only the copy is changed. Each test named by a mutation is built
and run until one fails: then the mutation is caught. One that no test notices survives, and wants a new test.
Before that, every test runs once on the copy as it is and must pass, or it could catch nothing. A line of the
results is written as each mutation ends; a second start goes on behind it, and plants what is new in the
table.

Tests are written "gelu fp32" (dev/kernels; "gelu fp32 race" under the race record), "model fp32 adamw"
(test_gpt2), "host dataloader" (dev/test/*_test.cpp) and "program fp32 adamw: WORDS" (pytest -k WORDS
dev/test/test_program.py). They are built with -O1, which compiles three times
as fast.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ["Makefile", "train_gpt2.cu", "test_gpt2.cu", "llmc", "dev"]
FLAGS = "-std=c++20 -O1 -march=native -fno-strict-aliasing -w -Idev/sim -I."
RACE_FLAGS = "-Wp,-fsanitize=thread"
HOST_FLAGS = "-std=c++20 -O1 -w -I."
BUILD_S, RUN_S = 900, 900


@dataclass
class Mutation:
    file: str
    old: str  # occurs once in the file, however its words are broken into lines
    new: str
    tests: list[str]

    def planted_in(self, text: str) -> tuple[str, int]:
        """The mutated text, and how often `old` occurs in it as it is."""
        pattern = re.compile(r"\s+".join(re.escape(word) for word in self.old.split()))
        return pattern.sub(lambda _: self.new, text), len(pattern.findall(text))

    @property
    def place(self) -> str:
        return f"{self.file}: {one_line(self.old)} -> {one_line(self.new)}"


def one_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


def both(kernel: str) -> list[str]:
    return [f"{kernel} fp32", f"{kernel} bf16"]


MODEL = ["model fp32 sgd_sai", "model fp32 adamw"]
MODEL_BF16 = ["model bf16 sgd_sai"]


def program(words: str, optimizer: str = "sgd_sai") -> list[str]:
    return [f"program fp32 {optimizer}: {words}"]


def table() -> list[Mutation]:
    def of(file, *rows, tests):
        return [Mutation(file, row[0], row[1], row[2] if len(row) > 2 else tests) for row in rows]

    return [
        *of(
            "llmc/gelu.cuh",
            ("kCubic = 0.044715f", "kCubic = 0.044f"),
            ("two_u >= 0 ?", "two_u < 0 ?"),
            ("gate.s + x * gate.s", "gate.s - x * gate.s"),
            ("kThreeCubic = 3 * 0.044715f", "kThreeCubic = 2 * 0.044715f"),
            ("dy[k] * gelu_derivative(x[k])", "gelu_derivative(x[k])"),
            ("gate.s * gate.one_minus_s *", "gate.s *"),
            tests=both("gelu"),
        ),
        *of(
            "llmc/layernorm.cuh",
            ("/ C + kLayernormEps)", "/ (C - 1) + kLayernormEps)"),
            ("/ C + kLayernormEps)", "/ C)"),
            ("* r * w[k] + b[k]", "* r * w[k]"),
            ("x[i].set(k, x[i][k] + y[i][k])", "x[i].set(k, x[i][k] - y[i][k])"),
            ("(g - mean_g - xhat * mean_g_xhat)", "(g - mean_g + xhat * mean_g_xhat)"),
            ("(g - mean_g - xhat * mean_g_xhat)", "(g - xhat * mean_g_xhat)"),
            ("dres[j].set(k, dres[j][k] + r[j]", "dres[j].set(k, r[j]"),
            ("dweight[k] += dy[j][k] * xhat", "dweight[k] += g * xhat"),
            ("dbias[k] += dy[j][k]", "dbias[k] += g"),
            ("f128 total = add ? load128(out) : f128{};", "f128 total{};"),
            ("dproj_bias[k] += dres[j][k];", "dproj_bias[k] += dy[j][k];"),
            ("store128(out + C + k, f128{dbias[k]", "store128(out + C + k, f128{dweight[k]"),
            ("mean[row] = m, rstd[row] = r", "mean[row] = r, rstd[row] = m"),
            tests=both("layernorm"),
        ),
        *of(
            "llmc/embedding.cuh",
            ("wpe + row % T * C", "wpe + row / T * C"),
            ("sum.set(k, a[k] + b[k])", "sum.set(k, a[k])"),
            ("(b0 + i) * used + at", "b0 * used + at"),
            ("2 * segment + 1) * C + c, sum, false)", "2 * segment) * C + c, sum, false)"),
            ("for (float& v : sum) v = 0;", ""),
            ("total.v[k] += old[k];", ""),
            ("order[end - 1]], last", "order[end - 1]], last"),
            tests=both("embedding"),
        )[:-1],
        *of(
            "llmc/classifier.cuh",
            ("d[k] -= dloss_scale", "d[k] += dloss_scale"),
            ("probability_scale(dloss_scale_ / state_.sum)", "probability_scale(1 / state_.sum)"),
            ("if (c + k >= V) d[k] = 0;", ";"),
            ("else if (c < Vp) store128(row_logits + c, x128{});", ""),
            ("kLn2 * (log2f(state.sum) - ", "kLn2 * (log2f(state.sum) + "),
            ("state.sum *= ptx::ex2(state.max - max);", ""),
            ("if (c + k >= V) x.set(k, -INFINITY);", ";"),
            ("(add ? *loss : 0.0f) +", ""),
            ("if (!valid && lane == 0) losses[row] = NAN;", ""),
            ("if (c + k == target)", "if (c + k == target + 1)"),
            tests=both("classifier"),
        ),
        *of(
            "llmc/bias.cuh",
            ("write == Write::Add ? dbias[column] + total : total", "total"),
            ("x.set(i, x[i] + b[i])", "x.set(i, x[i] - b[i])"),
            ("bias + at % cols", "bias + at / cols % cols"),
            ("for (; row < end; row += kBiasWarps) {", "for (; row < begin; row += kBiasWarps) {"),
            tests=both("matmul"),
        ),
        *of(
            "llmc/matmul.cuh",
            (
                "op_a = key.layout == MatmulLayout::TN ? CUBLAS_OP_T : CUBLAS_OP_N",
                "op_a = key.layout == MatmulLayout::NT ? CUBLAS_OP_T : CUBLAS_OP_N",
            ),
            ("beta = key.write == Write::Add ? 1.0f : 0.0f", "beta = key.write == Write::Add ? 0.0f : 0.0f"),
            (
                "product(wgrad_key(x.C, x.OC, x.N, x.write), {.a = x.inp, .b = x.dout,",
                "product(wgrad_key(x.C, x.OC, x.N, x.write), {.a = x.dout, .b = x.inp,",
            ),
            (
                "if (inside == MatmulEpilogue::Dgelu) plan.descriptors.set_aux(x.pre_gelu);",
                "if (inside == MatmulEpilogue::Dgelu) plan.descriptors.set_aux(x.b);",
            ),
            ("alpha = 1.0f,", "alpha = 0.5f,"),
            ("set_bias(adds_later ? x.scratch : x.dbias);", "set_bias(x.dbias);"),
            ("&& adds_later) add_bias_slices(", "&& false) add_bias_slices("),
            (
                "static_cast<int64_t>(key.m), key.write, gpu);",
                "static_cast<int64_t>(key.m), Write::Add, gpu);",
            ),
            ("x.dbias ? MatmulEpilogue::Bgrad", "x.dbias ? MatmulEpilogue::None"),
            (
                "{.a = x.weight, .b = x.inp, .d = x.out, .bias = x.bias, .pre_gelu_out = x.pre_gelu}",
                "{.a = x.weight, .b = x.inp, .d = x.pre_gelu, .bias = x.bias, .pre_gelu_out = x.out}",
            ),
            ("else if (works(*plan)) plans.push_back", "else plans.push_back"),
            ("(proposed != 1 || plans.empty())) propose(false)", "proposed != 1) propose(false)"),
            ("if (status != CUBLAS_STATUS_SUCCESS) return {};", "CUBLAS_CHECK(status);"),
            ("if (!plan) left_out.push_back(given);", "if (!plan) continue;"),
            ("{.fused = fused}, MatmulDescriptors", "given.settings, MatmulDescriptors"),
            ("look < 2;", "look < 1;"),
            ("first_look[i] = std::min(first_look[i], time_us(i, 1));", "first_look[i] = time_us(i, 1);"),
            ("return i > 0 && first_look[i]", "return first_look[i]"),
            ("us[i] = rounds[i][kRounds / 2];", "us[i] = rounds[i][0];"),
            ("us < kWarmUs;", "us < 2 * kWarmUs;"),
            ("runs <= kMostRuns && us", "us"),
            ("if (!std::exchange(warm_, true))", "if (std::exchange(warm_, true))"),
            (
                "left_out_ += left_out.size();",
                "left_out_ += 0;",
                program("test_algorithms_that_cannot_be_made_again"),
            ),
            (
                "left_out_ == 0 || std::exchange(told_left_out_, true)",
                "left_out_ == 0",
                program("test_algorithms_that_cannot_be_made_again"),
            ),
            ("as_they_came_++;", "", program("test_algorithms_that_cannot_be_made_again")),
            tests=both("matmul"),
        ),
        *of(
            "llmc/attention_fp32.cuh",
            (".row(query), kScaleLog2);\n    o.clear();", ".row(query), kScale);\n    o.clear();"),
            (
                "for (int key = 0; key <= query; key++) {\n        const float score",
                "for (int key = 0; key < T; key++) {\n        const float score",
            ),
            ("sum *= correction;", ""),
            ("top + log2f(sum)", "log2f(sum)"),
            ("(d_o.dot(values.row(key)) - row_dot)", "d_o.dot(values.row(key))"),
            (
                "dq.store(packed_rows(dqkv, kQuery, head, T, NH).row(query), kScale)",
                "dq.store(packed_rows(dqkv, kQuery, head, T, NH).row(query), 1.0f)",
            ),
            ("dk.store(packed_rows(dqkv, kKey,", "dk.store(packed_rows(dqkv, kValue,"),
            (
                "dv.add(exp2f(k.dot(queries.row(query)) - lse[rows + query])",
                "dv.add(exp2f(k.dot(queries.row(query)))",
            ),
            ("- row_dots[rows + query]", "+ row_dots[rows + query]"),
            tests=["attention fp32"],
        ),
        *of(
            "llmc/attention_tile.cuh",
            ("key + 8 * n + e % 2 > query", "key + 8 * n + e % 2 >= query"),
            (
                "(static_cast<int64_t>(b) * T * 3 + which) * width",
                "(static_cast<int64_t>(b) * T * 3 + 2 - which) * width",
            ),
            ("constexpr float kScale = 0.125f", "constexpr float kScale = 0.25f"),
            ("first + row < T);", "true);"),
            (
                "ptx::mma_m16n8k16(c[m][n + 1], a[m], b[2], b[3]);",
                "ptx::mma_m16n8k16(c[m][n + 1], a[m], b[3], b[2]);",
            ),
            tests=["attention bf16"],
        ),
        *of(
            "llmc/attention_softmax.cuh",
            ("sum[m][0] *= correction[m][0], sum", "sum"),
            ("ptx::ex2(reference[m][j] - next[m][j]);", "ptx::ex2(next[m][j] - reference[m][j]);"),
            ("reference[m][j] = next[m][j];", ""),
            ("inverse[m][j] = 1.0f / total;", "inverse[m][j] = total;"),
            ("reference[m][j] + log2f(total)", "reference[m][j]"),
            tests=["attention bf16"],
        ),
        *of(
            "llmc/attention_forward.cuh",
            (
                "if (key + kKeys > warp_query + 1) mask_future_keys",
                "if (key > warp_query + 1) mask_future_keys",
            ),
            tests=["attention bf16"],
        ),
        *of(
            "llmc/attention_backward.cuh",
            ("multiply_accumulators(dv, p, q.d_o, 0);", "multiply_accumulators(dv, ds, q.d_o, 0);"),
            ("ds[m][n][e] = e % 2 ? -stats.w : -stats.y;", "ds[m][n][e] = e % 2 ? stats.w : stats.y;"),
            ("if (block > 0) sum.load(dq_scratch, step);", "if (block > 1) sum.load(dq_scratch, step);"),
            ("ds[m][n][e] = -stats[m][e / 2].y;", "ds[m][n][e] = 0;"),
            (
                "columns[g][column + e] = first ? sum[e] : columns[g][column + e] + sum[e];",
                "columns[g][column + e] = sum[e];",
            ),
            ("bias[column] = write == Write::Add ? bias[column] + sum : sum;", "bias[column] = sum;"),
            (
                "store_column_sums(s.head.bias_row(kValue, block, a.NH), dv, 1.0f, s.columns);",
                "store_column_sums(s.head.bias_row(kValue, block, a.NH), dv, kScale, s.columns);",
            ),
            tests=["attention bf16"],
        ),
        *of(
            "llmc/attention_gradient.cuh",
            ("dot = fmaf(x[u][k], y[u][k], dot);", "dot = fmaf(x[u][k], y[u][k], -dot);"),
            ("lanes < 8; lanes *= 2) dot +=", "lanes < 4; lanes *= 2) dot +="),
            ("if (copy) copy[mine] = stats;", "if (copy) copy[i] = stats;"),
            ("if (chunk == u) stats.y = dot;", "stats.y = dot;"),
            ("if (query >= a.T) stats = float2{0.0f, 0.0f};", ""),
            ("min(first + i + u * kStep, a.T - 1)", "min(first + i, a.T - 1)"),
            ("lanes < kLanes; lanes *= 2) sum +=", "lanes < kLanes / 2; lanes *= 2) sum +="),
            ("sums[column] = sum * factor;", "sums[column] = sum;"),
            tests=["attention bf16"],
        ),
        *of(
            "llmc/attention_forward_sm90.cuh",
            ("min(tiles, 2 * block + group + 1);", "min(tiles, 2 * block + 1);"),
            ("start_sum(o, p, s.ring[tile - 1].v);", "start_sum(o, p, s.ring[tile].v);"),
            ("ptx::wgmma_wait<0>(o[0]);  // stays", "// stays"),
            ("ptx::wgmma_wait<1>(scores[0]);", ""),
            ("if (key + kWarpgroupKeys > warp_query + 1) mask", "if (key > warp_query + 1) mask"),
            ("if (moved) rescale(o, correction);", ""),
            ("if (moved) rescale(sum, correction);", ""),
            ("s.ring.release(tile - 1);", "s.ring.release(tile);"),
            ("ptx::mbarrier_wait(&s.ring.rows, 0);", ""),
            (
                "s.ring.wait(tile); ptx::wgmma_fence(); start_scores(scores, q, s.ring[tile].k);",
                "ptx::wgmma_fence(); start_scores(scores, q, s.ring[tile].k); s.ring.wait(tile);",
            ),
            ("s.ring.wait(tile);", ""),
            ("ptx::wgmma_fence();\n    start_sum(o, p", "start_sum(o, p"),
            tests=["attention bf16"],
        ),
        *of(
            "llmc/attention_ring.cuh",
            ("if (tile >= kStages) ptx::mbarrier_wait(&empty", "if (false) ptx::mbarrier_wait(&empty"),
            ("parity(tile - kStages));", "parity(tile));"),
            ("static_cast<unsigned>(tile) / kStages % 2;", "static_cast<unsigned>(tile) % 2;"),
            ("tile + kAhead >= kStages &&", "tile + kAhead > kStages &&"),
            ("tile + kAhead < tiles) load", "tile + kAhead < tiles - 1) load"),
            ("(which * NH + head % NH) * kHeadSize)", "(which + head % NH * 3) * kHeadSize)"),
            ("b(head / NH) {}", "b(head % NH) {}"),
            ("{kHeadSize, kBoxRows, 1}", "{kHeadSize, kBoxRows / 2, 1}"),
            ("strides[] = {row_bytes, rows * row_bytes};", "strides[] = {row_bytes, row_bytes};"),
            ("static_cast<uint64_t>(width), rows, static", "static_cast<uint64_t>(width), rows + 1, static"),
            ("__syncwarp();", ""),
            tests=["attention bf16", "ptx bf16", "attention bf16 race"],
        ),
        *of(
            "llmc/attention_backward_sm90.cuh",
            ("ptx::wgmma_wait<0>(ds[0]);", ""),
            ("ptx::wgmma_wait<1>(ds[0]);", ""),
            ("ptx::wgmma_wait<kFirst ? 1 : 2>(p[0]);", "ptx::wgmma_wait<2>(p[0]);"),
            ("ptx::wgmma_wait<1>(dk[0]);", ""),
            ("logs[n][0] = pair.x, logs[n][1] = pair.z", "logs[n][0] = pair.z, logs[n][1] = pair.x"),
            ("(ds[0][n][e] - dots[n][e % 2])", "(ds[0][n][e] - dots[n][0])"),
            ("(ds[0][n][e] - stats[e / 2].y)", "(ds[0][n][e] - stats[0].y)"),
            ("if constexpr (kFirst) mask_past_queries(p);", ""),
            ("s.ring.wait(0);  // all the same: a wait may not skip a phase", ""),
            ("s.ring.release(0);", ""),
            (
                "if constexpr (!kFirst) start_sum(dk, left_ds,",
                "if constexpr (!kFirst) start_sum(dv, left_ds,",
            ),
            ("start_sum(dk, left_ds, s.ring[tiles - 1].q);", ""),
            ("start_sum(dq, left, stage.k);", "start_sum(dq, left, stage.v);"),
            ("if (group < tiles) {", "if (group < tiles - 1) {"),
            ("ptx::bulk_load(stage.stats, stats + query,", "ptx::bulk_load(stage.stats, stats + first,"),
            ("ptx::barrier_sync(1 + group, 128);", ""),
            ("__syncthreads();  // the ring is free", ""),
            tests=["attention bf16", "attention bf16 race"],
        ),
        *of(
            "llmc/grad_norm.cuh",
            ("sum += x * x;", "sum += x;"),
            ("clip > 0 && norm > clip ?", "clip > 0 ?"),
            ("static_cast<float>(clip / norm)", "static_cast<float>(clip / (norm + 1e-6))"),
            ("if (!isfinite(norm) || !(factor >= FLT_MIN)) skip = Skip::GradientNorm;", ""),
            ("if (!isfinite(step_loss)) skip = Skip::Loss;", ""),
            ("clip / norm)", "clip / sum)"),
            tests=both("grad_norm"),
        ),
        *of(
            "llmc/adamw.cuh",
            (
                "constants.beta1 * mm.v[k] + constants.one_minus_beta1 * gk",
                "constants.beta2 * mm.v[k] + constants.one_minus_beta2 * gk",
            ),
            ("constants.beta2 * vv.v[k]", "constants.beta1 * vv.v[k]"),
            ("constants.one_minus_beta2 * (gk * gk)", "constants.one_minus_beta2 * gk"),
            ("1.0 - pow(beta1, t)", "1.0 - pow(beta1, t + 1)"),
            ("1.0 / sqrt(1.0 - pow(beta2, t))", "1.0 / (1.0 - pow(beta2, t))"),
            ("sqrtf(vk) * root_factor + constants.eps", "sqrtf(vk + constants.eps) * root_factor"),
            ("fmaf(-lr_decay, p.v[k], p.v[k])", "fmaf(lr_decay, p.v[k], p.v[k])"),
            ("blocks[chunk.block].decay ? constants.lr_decay : 0.0f", "constants.lr_decay"),
            ("const float gk = clip_factor * g.v[k];", "const float gk = g.v[k];"),
            ("if (!state->apply()) return;\n    const Chunk", "const Chunk"),
            ("++state->applied_updates", "state->applied_updates++"),
            ("store128_streaming(v + at, vv);", ""),
            (
                "return 2 * sizeof(float) * padded_parameters;",
                "return sizeof(float) * padded_parameters;",
                program("test_state_of_the_optimizer", "adamw"),
            ),
            tests=["adamw fp32", "adamw bf16", "model fp32 adamw"],
        ),
        *of(
            "llmc/sgd_sai.cuh",
            ("sqrt(sums.s2) / (sqrt(variance) + eps_over_c)", "sqrt(sums.s2) / sqrt(variance + eps_over_c)"),
            ("spread / (count - 1)", "spread / count"),
            ("sums.s2 - sums.s1 * (sums.s1 / count)", "sums.s2"),
            ("if (n == 1) return 1.0f;", ""),
            ("if (sums.s2 == 0) return static_cast<float>(sqrt(count));", ""),
            ("return gsnr / largest_gsnr;", "return gsnr;"),
            (
                "eps / static_cast<double>(state->clip_factor)",
                "eps * static_cast<double>(state->clip_factor)",
            ),
            ("keep * mm.v[k] + take * gk", "keep * mm.v[k] + gk"),
            (
                "keep = first ? 0.0f : constants.momentum, take = first ? 1.0f :",
                "keep = constants.momentum, take = first ? constants.one_minus_momentum :",
            ),
            ("fmaf(-lr_decay, p.v[k], p.v[k])", "fmaf(-lr_decay * gain[chunk.block], p.v[k], p.v[k])"),
            ("constants.learning_rate * gain[chunk.block]", "constants.learning_rate"),
            ("const float gk = clip_factor * g.v[k];", "const float gk = g.v[k];"),
            (
                "return state.apply() && !state.gains_ready && state.grad_norm > 0;",
                "return state.apply() && state.grad_norm > 0;",
            ),
            ("sums.s2 += x * x;\n", "sums.s2 += x * x;\n sums.s1 += 1e-9;\n"),
            tests=["sgd_sai fp32", "sgd_sai bf16", "model fp32 sgd_sai"],
        ),
        *of(
            "llmc/tensors.h",
            (
                'X(wpe,      "wpe.weight",           model, P,  C,       true,  normal)',
                'X(wpe,      "wpe.weight",           model, P,  C,       false,  normal)',
                MODEL,
            ),
            (
                'X(lnfw,     "ln_f.weight",          model, 1,  C,       false, ones)',
                'X(lnfw,     "ln_f.weight",          model, 1,  C,       true, ones)',
                MODEL,
            ),
            (
                'X(attprojw, "attn.c_proj.weight",   layer, C,  C,       true,  residual)',
                'X(attprojw, "attn.c_proj.weight",   layer, C,  C,       true,  normal)',
                program("test_initial_weights", "adamw"),
            ),
            (
                'X(ln2w,     "ln_2.weight",          layer, 1,  C,       false, ones)',
                'X(ln2w,     "ln_2.weight",          layer, 1,  C,       false, zeros)',
                program("test_initial_weights", "adamw"),
            ),
            ('"mlp.c_fc.bias"', '"mlp.c_proj.bias_"', MODEL),
            tests=MODEL,
        ),
        *of(
            "llmc/initialise.cuh",
            ("kInitDeviation / std::sqrt(2.0f *", "kInitDeviation / std::sqrt("),
            ("seed, b);", "seed, 0);"),
            ("{a.x, a.y, b.x, b.y}", "{a.x, a.y, a.x, a.y}"),
            (
                "philox(seed, stream, quad)",
                "philox(1, stream, quad)",
                program("test_the_same_seed", "sgd_sai"),
            ),
            tests=program("test_initial_weights", "adamw"),
        ),
        *of(
            "llmc/gpt2.cuh",
            (
                "a.ln2, a.ln2_mean, a.ln2_rstd, block_input(l), act.proj,",
                "a.ln2, a.ln2_mean, a.ln2_rstd, act.encoded, act.proj,",
            ),
            (
                "l == 0 ? act.encoded : act.layer(l - 1).residual3",
                "l == 0 ? act.encoded : act.layer(l).residual3",
            ),
            (
                "{gradients.lnfw, gradients.lnfb, gradients.layer(L - 1).fcprojb}",
                "{gradients.lnfw, gradients.lnfb, gradients.layer(0).fcprojb}",
            ),
            ("l > 0 ? gradients.layer(l - 1).fcprojb : nullptr", "nullptr"),
            (
                "a.ln2_mean, a.ln2_rstd, N, C, Write::Add, write,",
                "a.ln2_mean, a.ln2_rstd, N, C, Write::Assign, write,",
            ),
            (
                "w.ln1w, a.ln1_mean, a.ln1_rstd, N, C, Write::Add, write,",
                "w.ln1w, a.ln1_mean, a.ln1_rstd, N, C, Write::Assign, write,",
            ),
            (".write = first == 0 ? write : Write::Add}", ".write = Write::Assign}"),
            (
                ".write = first == 0 ? write : Write::Add}",
                ".write = write}",
                program("test_logits_in_chunks"),
            ),
            (
                ".write = write, .dbias = d.fcb, .scratch",
                ".write = Write::Assign, .dbias = d.fcb, .scratch",
            ),
            ("{d.ln2w, d.ln2b, d.attprojb}", "{d.ln2b, d.ln2w, d.attprojb}"),
            (
                ".inp = a.atty, .weight = w.attprojw, .bias = w.attprojb",
                ".inp = a.atty, .weight = w.attprojw, .bias = w.fcprojb",
            ),
            ("weights.lnfw, weights.lnfb, N, C,", "weights.lnfw, w.ln2b, N, C,"),
            ("return tokens_.get() + 2 * max_tokens();", "return tokens_.get() + 1 * max_tokens();"),
            (
                "round_weights(weights_.get(), master_.get()",
                "round_weights(weights_.get(), gradients_.get()",
                MODEL_BF16,
            ),
            (
                "layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, w.ln2w, w.ln2b",
                "layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, w.ln1w, w.ln2b",
                program("test_choices_of_speed"),
            ),
            (
                "gelu_forward(a.fch_gelu, a.fch, static_cast<size_t>(N) * 4 * C,",
                "gelu_forward(a.fch_gelu, a.fch, static_cast<size_t>(N) * 2 * C,",
                program("test_choices_of_speed"),
            ),
            (
                "sequences) * config.seq_len;",
                "config.batch_size) * config.seq_len;",
                program("test_validation_does_not"),
            ),
            ("act.lnf + last * shape().channels", "act.lnf", program("test_sample_continues", "adamw")),
            tests=MODEL,
        ),
        *of(
            "llmc/activations.cuh",
            (
                "X(ln2,       layer, floatX, N,       C,     none)",
                "X(ln2,       model, floatX, N,       C,     none)",
                MODEL,
            ),
            (
                "X(residual3, layer, floatX, N,       C,     block)",
                "X(residual3, layer, floatX, N,       C,     gelu_layernorm)",
                program("test_choices_of_speed"),
            ),
            (
                "static_cast<int>(recompute) <= static_cast<int>(kept)",
                "static_cast<int>(recompute) < static_cast<int>(kept)",
                MODEL,
            ),
            tests=MODEL,
        ),
        *of(
            "llmc/trainer.cuh",
            ("micro_step == 0 ? Write::Assign : Write::Add", "Write::Add"),
            ("micro_step == 0 ? Write::Assign : Write::Add", "Write::Assign"),
            (
                "static_cast<float>(config_.micro_steps) * model_.config.batch_size",
                "static_cast<float>(model_.config.batch_size)",
            ),
            ("graphs_[write == Write::Add]", "graphs_[0]"),
            ("config_.grad_clip,", "0.0,"),
            ("copy_to_host(&reports_[step % kTurns]", "copy_to_host(&reports_[0]"),
            ("if (pending_) report = collect(last_);", "if (pending_) report = collect(step);"),
            ("{step, reports_[step % kTurns], step_ms", "{step + 1, reports_[step % kTurns], step_ms"),
            tests=program("test_run_of_the_reference and raw or test_log or test_choices_of_speed"),
        ),
        *of(
            "llmc/schedule.h",
            ("static_cast<double>(s + 1)", "static_cast<double>(s)"),
            ("const int64_t s = k - 1;", "const int64_t s = k;"),
            ("(1 + cos(M_PI * p)) / 2", "(1 - cos(M_PI * p)) / 2"),
            ("lr * (f + (1 - f) * (1 + cos", "lr * ((1 - f) * (1 + cos"),
            ("lr * (1 - (1 - f) * p)", "lr * (1 - f * p)"),
            ("static_cast<double>(o.steps - o.warmup_steps)", "static_cast<double>(o.steps)"),
            tests=["host schedule"],
        ),
        *of(
            "llmc/dataloader.h",
            ("static_cast<size_t>(tokens[i]) + 1]++", "static_cast<size_t>(tokens[i])]++"),
            ("update * S_ + S_ / c_.ranks * c_.rank + micro_step * c_.B", "update * S_ + micro_step"),
            ("slot.tokens.assign(n, 0);", "slot.tokens.resize(n);"),
            ("queue_.restart((update - 1) * micro_steps_)", "queue_.restart(update * micro_steps_)"),
            ("number % batches_ * c_.ranks + c_.rank", "number * c_.ranks + c_.rank"),
            ("std::clamp<int64_t>(samples_ - first, 0, c_.B)", "c_.B"),
            ("if (set_.samples < S_)", "if (false)"),
            tests=["host dataloader"],
        ),
        *of(
            "llmc/shards.h",
            ("(tokens - 1) / T : 0", "tokens / T : 0"),
            (
                "std::copy(text_.begin() + 1, text_.end(), targets);",
                "std::copy(text_.begin(), text_.end() - 1, targets);",
            ),
            ("vocabulary > vocab_size", "vocabulary > vocab_size + 1"),
            ("< vocab_size)\n        return n;", "<= vocab_size)\n        return n;"),
            ("if (file_bytes != wanted)", "if (file_bytes < wanted)"),
            ("header[3] == 0 ? kVocabularyOfZero : header[3];", "header[3];"),
            ("if (header[1] != kShardVersion)", "if (false)"),
            tests=["host dataloader", "program fp32 adamw: test_broken_shards or test_token_beyond"],
        ),
        *of(
            "llmc/sample_order.h",
            ("within - (ends_[turn] - samples_[shard])", "within - ends_[turn] + samples_[turn]"),
            ("static_cast<uint64_t>(epoch_)", "0"),
            ("mix(seed_ + kStep)", "mix(kStep)"),
            ("left > 1; left--", "left > 2; left--"),
            tests=["host dataloader"],
        ),
        *of(
            "llmc/pretrained.h",
            ("if (!std::isfinite(data[j]))", "if (std::isnan(data[j]))"),
            ("if (place.tensor->shape != found->second->shape)", "if (false)"),
            ("if (!files.places().contains(name)) return", "if (false) return"),
            ('"h.")) return false;', '"h.")) return true;'),
            tests=["host checkpoint", "program fp32 adamw: test_init_from"],
        ),
        *of(
            "llmc/safetensors.h",
            ("out.begin > out.end || out.end > data_bytes", "out.end > data_bytes"),
            ("out.begin > out.end || out.end > data_bytes", "out.begin > out.end"),
            ("if (bytes != out.end - out.begin)", "if (bytes > out.end - out.begin)"),
            ("if (t.begin != end)", "if (t.begin < end)"),
            ('if (end == data_bytes) return "";', 'return "";'),
            ("header_bytes > file_bytes - sizeof(header_bytes) ||", "header_bytes > file_bytes ||"),
            ("t.begin + first * t.dtype->bytes", "t.begin + first * sizeof(float)"),
            ("source(buffer.data(), i, first, now)", "source(buffer.data(), i, 0, now)"),
            ("(text.size() + 7) / 8 * 8", "(text.size() + 3) / 4 * 4"),
            tests=["host safetensors"],
        ),
        *of(
            "llmc/tokenizer.h",
            ("version == 1 ? 50256 : header[3]", "version == 1 ? header[3] : 50256"),
            ("bytes.substr(1, length)", "bytes.substr(0, length)"),
            ("end_of_text >= vocabulary", "end_of_text > vocabulary"),
            tests=["host tokenizer"],
        ),
        *of(
            "llmc/reduce.cuh",
            (
                "lane < kThreads / kWarpSize ? scratch[lane]",
                "lane < kThreads / kWarpSize - 1 ? scratch[lane]",
            ),
            ("x = fmaxf(x, __shfl_xor_sync", "x = fminf(x, __shfl_xor_sync", ["sgd_sai fp32"]),
            tests=["grad_norm fp32"],
        ),
        *of(
            "llmc/update.cuh",
            (
                "half.v[k] = static_cast<floatX>(master.v[k]);",
                "half.v[k] = static_cast<floatX>(master.v[0]);",
            ),
            tests=["adamw bf16", "sgd_sai bf16"],
        ),
        *of(
            "llmc/random.cuh",
            ("round < 10", "round < 1"),
            ("radius * cosine, radius * sine", "radius * cosine, radius * cosine"),
            ("sqrtf(-2.0f * logf(", "sqrtf(-1.0f * logf("),
            tests=program("test_initial_weights", "adamw"),
        ),
        *of(
            "llmc/sampler.h",
            (
                "exp((logits_cpu[v] - largest) / options.temperature)",
                "exp((logits_cpu[v] - largest) * options.temperature)",
            ),
            ("for (int v = 0; v < vocab_size; v++)", "for (int v = 0; v <= vocab_size; v++)"),
            ("left -= weights[i];", ""),
            tests=["host sampler"],
        ),
        *of(
            "llmc/logger.h",
            ("O_CREAT | O_EXCL | O_APPEND", "O_CREAT | O_APPEND"),
            ('.add("grad_norm", short_decimal(r.grad_norm))', '.add("grad_norm", short_decimal(r.loss))'),
            tests=["host logger", *program("test_run_of_the_reference", "adamw")],
        ),
        *of(
            "llmc/memory_plan.cuh",
            ('{"gradients", Np * sizeof(float)}', '{"gradients", Np * sizeof(floatX) / 2}'),
            ("(fits(middle) ? low : high) = middle;", "(fits(middle) ? high : low) = middle;"),
            ("if (wanted <= available) return;", "return;"),
            tests=program("test_too_little_memory or test_dry_run or test_state_of_the_optimizer"),
        ),
        *of(
            "train_gpt2.cu",
            (
                "if (!o.init_from.empty()) {\n        const ModelShape",
                "if (false) {\n        const ModelShape",
            ),
            ("batch == 0 ? Write::Assign : Write::Add, token_weight);", "Write::Assign, token_weight);"),
            ("static_cast<float>(val_data->samples()) *", "static_cast<float>(o.val_sequences) *"),
            ("batch < val_data->batches(); batch++", "batch + 1 < val_data->batches(); batch++"),
            (
                "o.total_batch / o.seq_len, static_cast<uint64_t>(o.seed), o.shuffle",
                "o.total_batch / o.seq_len, 1, o.shuffle",
            ),
            (".tokens = result.step * o.total_batch", ".tokens = result.step * o.batch_size * o.seq_len"),
            (
                "applied++, skipped_in_a_row = 0;",
                "applied++;",
                program("test_skipped_updates_among", "adamw"),
            ),
            (
                "const bool failed = diverged || (applied == 0 && signal == 0);",
                "const bool failed = diverged;",
                program("test_a_run_that_applied_nothing"),
            ),
            (
                "constexpr int kMaxSkippedInARow = 10;",
                "constexpr int kMaxSkippedInARow = 9;",
                program("not_finite"),
            ),
            ("if (const auto result = run.trainer.flush()) run.tell(*result);", "", program("test_log")),
            ("scheduled_learning_rate(o, step + 1);", "scheduled_learning_rate(o, step);"),
            ("step % o.val_every == 0", "step % o.val_every == 1"),
            ("|| run.diverged || interrupt_signal();", "|| run.diverged;", program("test_a_signal_ends")),
            ("stop = last || run.diverged ||", "stop = last ||", program("not_finite or explodes")),
            ("if (signal) return 128 + signal;", "", program("test_a_signal_ends")),
            (
                "static_cast<float>(state.grad_norm)",
                "static_cast<float>(state.grad_norm * state.clip_factor)",
            ),
            (
                "{train_data.micro_steps(), o.grad_clip, o.graph}",
                "{train_data.micro_steps(), 1.0, o.graph}",
                program("test_clipping"),
            ),
            ("if (o.dry_run) return 0;", "", program("test_dry_run")),
            ("check_memory(config, Optimizer::Options::from(o), gpu);", "", program("test_too_little")),
            tests=program("test_run_of_the_reference or test_log or test_validation or test_shuffle"),
        ),
        *of(
            "llmc/options.cpp",
            ("if (o.total_batch % micro == 0) return;", "if (true) return;"),
            ("if (o.channels % kHeadSize != 0) {", "if (false) {"),
            ("if (o.warmup_steps > o.steps) {", "if (false) {"),
            ("|| stop != end ||", "||"),
            tests=["host options"],
        ),
    ]


def real(mutations: list[Mutation]) -> list[Mutation]:
    return [m for m in mutations if m.old != m.new]


# ---- building and running in the copy


def copy_changed(source, target) -> None:
    """Copies a file that differs, with a new date: what was built of a planted one is older then."""
    if not Path(target).exists() or Path(source).read_bytes() != Path(target).read_bytes():
        shutil.copy(source, target)


OTHER = {"fp32": "bf16", "bf16": "fp32", "adamw": "sgd_sai", "sgd_sai": "adamw"}


class Copy:
    """The tree in a temporary directory, the tests in it, and what is planted now."""

    def __init__(self, root: Path, python: str):
        self.root, self.python = root, python
        for name in COPIED:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", ".pytest_cache")
                shutil.copytree(
                    ROOT / name, root / name, ignore=ignored, copy_function=copy_changed, dirs_exist_ok=True
                )
            else:
                copy_changed(ROOT / name, root / name)
        self.passed: set[str] = set()
        self.broken: dict[str, str] = {}

    def run(self, command: list[str], limit_s: int) -> tuple[int, str]:
        """Exit status and output; 124 where it ran over its time, which ends its whole group of processes."""
        environment = {
            **os.environ,
            "SIM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "BUILD_DIR": "build",
            "SIM_TIMEOUT_S": "60",
            "GTEST_COLOR": "no",
        }
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env=environment,
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return 124, output
        return process.returncode, output

    def target_and_command(self, test: str) -> tuple[str, list[str]]:
        words, _, expression = test.partition(": ")
        kind, *rest = words.split()
        if kind == "host":
            return f"build/host/test/{rest[0]}_test", [f"build/host/test/{rest[0]}_test"]
        if kind == "model":
            target = f"build/sim-{rest[0]}-{rest[1]}/test_gpt2"
            return target, [target]
        if kind == "program":
            command = [
                self.python,
                "-m",
                "pytest",
                "-q",
                "-x",
                "-p",
                "no:cacheprovider",
                "--tb=line",
                "-k",
                f"({expression}) and not {OTHER[rest[0]]} and not {OTHER[rest[1]]}",
                "dev/test/test_program.py",
            ]
            return f"build/sim-{rest[0]}-{rest[1]}/train_gpt2", command
        target = f"build/sim-{'-'.join(rest)}/kernels/{kind}"
        return target, [target]

    def test(self, test: str) -> tuple[str, str]:
        """("passed" | "failed" | "not built", what the output says)."""
        target, command = self.target_and_command(test)
        check, flags = ("race", f"{FLAGS} {RACE_FLAGS}") if test.endswith(" race") else ("", FLAGS)
        make = ["make", "-s", f"CHECK={check}", f"SIM_FLAGS={flags}", f"HOST_FLAGS={HOST_FLAGS}", target]
        status, output = self.run(make, BUILD_S)
        if status != 0:
            return "not built", "\n".join(line for line in output.splitlines() if "error" in line)[:300]
        if test.startswith("program"):  # another variant's program could be one that was planted before
            for other in self.root.glob("build/sim-*/train_gpt2"):
                if str(other.relative_to(self.root)) != target:
                    other.unlink()
        status, output = self.run(command, RUN_S)
        return ("passed" if status == 0 else "failed"), first_failure(output, status)

    def usable(self, test: str) -> bool:
        """Whether the test passes on the tree as it is."""
        if test not in self.passed and test not in self.broken:
            outcome, said = self.test(test)
            if outcome == "passed":
                self.passed.add(test)
            else:
                self.broken[test] = said
                print(f"the tree as it is: {test} {outcome}: {said}", file=sys.stderr, flush=True)
        return test in self.passed

    def plant(self, m: Mutation) -> tuple[str, str, str]:
        """(status, test that caught it, what it said) of one mutation; the copy is as before afterwards."""
        path = self.root / m.file
        original = path.read_text()
        mutated, found = m.planted_in(original)
        if found != 1:
            return "stale", "", f"its text occurs {found} times"
        tests = [test for test in m.tests if self.usable(test)]
        if not tests:
            return "untested", "", "no test of it passes on the tree as it is"
        try:
            path.write_text(mutated)
            for test in tests:
                outcome, said = self.test(test)
                if outcome == "not built":
                    return "not built", test, said
                if outcome == "failed":
                    return "caught", test, said
            return "survived", "", "passed: " + ", ".join(tests)
        finally:
            path.write_text(original)


FAILURES = [
    re.compile(p, re.M)
    for p in (
        r"^FAIL .*$",
        r"^simulator: .*$",
        r"^\[  FAILED  \] \S+",
        r"^FAILED .*$",
        r"^.*Error: .*$",
        r"^rank 0: (?!warning).*$",
        r"^.*(?:[Ee]rror|[Aa]ssert|sim:).*$",
    )
]


def first_failure(output: str, status: int) -> str:
    for pattern in FAILURES:
        if found := pattern.search(output):
            return " ".join(found[0].split())[:160]
    return f"exit status {status}"


# ---- results

COLUMNS = ["status", "file", "old", "new", "test", "said", "seconds"]


def read_results(path: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    if not path.exists():
        return {}
    rows = [dict(zip(COLUMNS, line.split("\t"), strict=True)) for line in path.read_text().splitlines()[1:]]
    return {(row["file"], row["old"], row["new"]): row for row in rows}


def key(m: Mutation) -> tuple[str, str, str]:
    return m.file, one_line(m.old), one_line(m.new)


def markdown(mutations: list[Mutation], results: dict) -> str:
    lines = ["| place | mutation | caught by |", "|---|---|---|"]
    for m in mutations:
        row = results.get(key(m))
        caught = (
            f"{row['test']}: {row['said']}"
            if row and row["status"] == "caught"
            else f"**{row['status']}**"
            if row
            else "-"
        )
        cells = (f"`{x}`" for x in (one_line(m.old), one_line(m.new)))
        lines.append(
            " | ".join(
                ["", m.file, " → ".join(cells).replace("|", "\\|"), caught.replace("|", "\\|"), ""]
            ).strip()
        )
    counts = [row["status"] for m in mutations if (row := results.get(key(m)))]
    return (
        "\n".join(lines)
        + f"\n\n{counts.count('caught')} of {len(mutations)} caught, {counts.count('survived')} survived\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="", help="plant those whose file or text this regular expression finds"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "build/mutations.tsv")
    parser.add_argument("--python", default=str(ROOT / ".venv/bin/python"))
    parser.add_argument("--keep", type=Path, help="work in this directory, and leave it there")
    parser.add_argument("--again", action="store_true", help="plant again what survived or wasn't built")
    parser.add_argument("--markdown", action="store_true", help="print the table of the results")
    arguments = parser.parse_args()
    mutations = [m for m in real(table()) if re.search(arguments.only, m.place)]
    results = read_results(arguments.results)
    if arguments.markdown:
        print(markdown(mutations, results))
        return 0

    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    if not arguments.results.exists():
        arguments.results.write_text("\t".join(COLUMNS) + "\n")
    with tempfile.TemporaryDirectory(prefix="mutate-") as temporary:
        if arguments.keep:
            arguments.keep.mkdir(parents=True, exist_ok=True)
        copy = Copy(arguments.keep or Path(temporary), arguments.python)
        for i, m in enumerate(mutations, 1):
            done = results.get(key(m))
            if done and (done["status"] == "caught" or not arguments.again):
                continue
            begin = time.monotonic()
            status, test, said = copy.plant(m)
            row = [
                status,
                *key(m),
                test,
                said.replace("\t", " ").replace("\n", " "),
                f"{time.monotonic() - begin:.0f}",
            ]
            results[key(m)] = dict(zip(COLUMNS, row, strict=True))
            with arguments.results.open("a") as out:
                out.write("\t".join(row) + "\n")
            print(f"[{i}/{len(mutations)}] {status:9} {m.place[:110]} | {test} | {row[-1]} s", flush=True)
    statuses = [results[key(m)]["status"] for m in mutations]
    print(f"{statuses.count('caught')} passed, {len(statuses) - statuses.count('caught')} failed")
    return 0 if set(statuses) == {"caught"} else 1


if __name__ == "__main__":
    sys.exit(main())
