#!/bin/sh
# cuda_test_engine bench <history> <batch> [percent of products, of attention, its blocks, its tiles,
# rows of a product's block]; the program is $1.
for batch in 8 32; do
  echo "== batch $batch"; $1 bench 1024 $batch
  for knobs in "14 100 0 8 8" "14 100 0 8 32" "100 100 0 8 0" "60 60 0 8 0" "30 100 0 8 0" "14 60 0 8 0" \
    "100 100 0 4 0" "100 100 0 6 0" "14 100 2 8 0" "14 100 1 8 0" "100 100 2 8 0" "14 14 0 8 0"; do
    echo "== batch $batch, knobs $knobs"; $1 bench 1024 $batch $knobs
  done
done
