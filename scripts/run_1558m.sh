#!/usr/bin/env bash
# GPT-2 1558M on one GPU:  scripts/run_1558m.sh [adamw|sgd_sai] [--dry-run] [flags of train_gpt2]
# How it is used otherwise: scripts/run.sh.
#
#   parameters   1,557,611,200 (48 layers, 1600 channels)
#   tokens       3.12e10: 29,710 updates of 1,048,576; 20 a parameter
#   FLOP         9.82e9 a token (6 N + 6 L C T), 3.06e20 in all
#   memory       66.1 GiB with AdamW, 60.3 GiB with SGD-SaI, at 16 sequences a micro-step
#   time         215 hours on one H100 at 40% of its 989 TFLOP/s: $537 at $2.50 an hour
#
# The share of the peak and the price are assumptions, not measurements; MFU=0.5 PRICE=3
# scripts/run_1558m.sh --dry-run computes with yours. Nine days on one GPU, and a run that ends early
# saves its weights but can't be resumed. As it stands this is for measuring memory and
# speed and for short runs (--steps 1000: seven hours), not for the whole. 16 sequences fit 80 GB with both
# optimizers; on 141 GB take --batch-size 32. 20 tokens a parameter is a common budget (Hoffmann et al.
# 2022), and three times OpenWebText: FineWeb. AdamW's rate is that of Brown et al. 2020, table 2.1, for
# 1.3B. SGD-SaI's is where to begin, untuned: see run_124m.sh.
name=1558m model=d48 parameters=1557611200 layers=48 channels=1600
batch=16 total=1048576 steps=29710
adamw=(--learning-rate 2e-4 --weight-decay 0.1)
sgd_sai=(--learning-rate 3e-3 --weight-decay 0.02)
source "$(dirname "$0")/run.sh"
