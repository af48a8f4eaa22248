#!/bin/sh
# The papers' studies, a line each, on pictures of yours:
#     sh examples/studies.sh squeeze_ratio cifar10:PATH --time 30m
# What follows the data goes to `flyweight sweep` as it is: --seeds 5, --out FOLDER, --arg width=1.0 …
set -eu
[ $# -ge 2 ] || { echo "usage: sh $0 STUDY DATA [OPTION ...]; the studies stand in $0" >&2; exit 2; }
study=$1 data=$2
shift 2
run() { model=$1; shift; exec flyweight sweep "$model" "$data" "$@"; }

case $study in
# SqueezeNet (arXiv:1602.07360): squeeze ratio (section 5.2), share of 3 x 3 kernels (5.3), the three forms of bypass (6)
squeeze_ratio) run squeezenet1_1 --arg width=0.5 --vary squeeze_ratio=0.125,0.25,0.5,0.75,1.0 "$@" ;;
pct_3x3)       run squeezenet1_1 --arg width=0.5 --arg squeeze_ratio=0.5 --vary pct_3x3=0.0625,0.5,0.9375 "$@" ;;
bypass)        run squeezenet1_1 --arg width=0.5 --vary bypass=none,simple,complex "$@" ;;
# MobileNet (arXiv:1704.04861): width and resolution multipliers (tables 6 and 7), separable or plain convolutions (4)
alpha_rho)     run mobilenet_v1_cifar --vary width=0.25,0.5,0.75,1.0 --vary resolution=16,24,32 "$@" ;;
separable)     run mobilenet_v1_cifar --arg width=0.5 --vary separable=true,false "$@" ;;
# ShuffleNet (arXiv:1707.01083): groups (table 2), with and without the shuffle (table 3)
groups)        run shufflenet_v1 --arg width=0.5 --vary groups=1,2,3,4,8 "$@" ;;
shuffle)       run shufflenet_v1 --arg width=0.5 --vary groups=3,8 --vary shuffle=true,false "$@" ;;
# Squeeze-and-excitation (arXiv:1709.01507), label smoothing (arXiv:1512.00567), batch normalisation (arXiv:1502.03167)
se)            run mobilenet_v1_cifar --arg width=0.5 --vary se=0,0.25 "$@" ;;
smoothing)     run mobilenet_v1_cifar --arg width=0.5 --vary label_smoothing=0,0.1 "$@" ;;
norm)          run mobilenet_v1_cifar --arg width=0.5 --vary norm=batch,none "$@" ;;
*) echo "there is no study $study: the studies stand in $0" >&2; exit 2 ;;
esac
