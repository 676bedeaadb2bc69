#!/usr/bin/env bash
# GPT-2 774M on one GPU:  scripts/run_774m.sh [adamw|sgd_sai] [--dry-run] [flags of train_gpt2]
# How it is used otherwise: scripts/run.sh.
#
#   parameters   774,030,080 (36 layers, 1280 channels)
#   tokens       1.55e10: 29,527 updates of 524,288; 20 a parameter
#   FLOP         4.93e9 a token (6 N + 6 L C T), 7.63e19 in all
#   memory       60.9 GiB with AdamW, 58.0 GiB with SGD-SaI, at 32 sequences a micro-step
#   time         53.6 hours on one H100 at 40% of its 989 TFLOP/s: $134 at $2.50 an hour
#
# The share of the peak and the price are assumptions, not measurements; MFU=0.5 PRICE=3 scripts/run_774m.sh
# --dry-run computes with yours. More than two days on one GPU, and a run that ends early saves its
# weights but can't be resumed. Begin with a shorter one (--steps 3000). 20 tokens a parameter
# is a common budget (Hoffmann et al. 2022), and more than OpenWebText's 9.0 billion: FineWeb, or a second
# pass. AdamW's rate is that of Brown et al. 2020, table 2.1, for 760M. SGD-SaI's is where to begin,
# untuned: see run_124m.sh.
name=774m model=d36 parameters=774030080 layers=36 channels=1280
batch=32 total=524288 steps=29527
adamw=(--learning-rate 2.5e-4 --weight-decay 0.1)
sgd_sai=(--learning-rate 3e-3 --weight-decay 0.02)
source "$(dirname "$0")/run.sh"
