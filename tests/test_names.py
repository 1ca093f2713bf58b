"""Names of runs: those that a command line has always had, so that nobody's folders are lost."""

import importlib

import pytest

from training.run import run_name

# (script, its flags, the name of the run's folder), as the scripts named them before settings declared it.
NAMES = [
    ("run", "--dataset cifar10 --epochs 200 --arch resnet34", "victim-cifar10-resnet34-infonce-200ep-seed0"),
    (
        "run",
        "--dataset shapes --arch resnet10w32 --num-train 4000 --epochs 4 --flat-epochs 1 -b 128 --lr 0.002",
        "victim-shapes-resnet10w32-infonce-4ep-seed0-batchsize=128-flatepochs=1-lr=0.002-numtrain=4000",
    ),
    (
        "run",
        "--dataset cifar10 --losstype supervised --epochs 200 --seed 3 --watermark True",
        "victim-cifar10-resnet34-supervised-200ep-seed3-watermark=True",
    ),
    (
        "run",
        "--losstype softnn --temperaturesn 5 --optimizer sgd --momentum 0.5 --wd 0 --n-views 3 --normalize True",
        "victim-cifar10-resnet34-softnn-200ep-seed0-momentum=0.5-nviews=3-normalize=True-optimizer=sgd-temperaturesn=5.0-weightdecay=0.0",
    ),
    (
        "run",
        "--losstype supcon --out_dim 64 --precision fp32 --recipe released",
        "victim-cifar10-resnet34-supcon-200ep-seed0-outdim=64-precision=fp32-recipe=released",
    ),
    ("run", "--dataset stl10 --size 96", "victim-stl10-resnet34-infonce-200ep-seed0-size=96"),
    ("run", "--dataset cifar10 --size 32", "victim-cifar10-resnet34-infonce-200ep-seed0"),
    ("steal", "--losstype mse --size 64", "stolen-cifar10-resnet34-mse-9000q-100ep-seed0-size=64"),
    ("linear_eval", "--modeltype random --size 64", "linear-cifar10-seed0-size=64"),
    ("run", "--preset 2022 --dataset cifar10", "victim-cifar10-resnet34-infonce-200ep-seed0"),
    ("run", "--preset modern", "victim-cifar10-resnet34-infonce-200ep-seed0-preset=modern"),
    (
        "run",
        "--preset modern --temperature 0.1 --views mild --warmup-epochs 5",
        "victim-cifar10-resnet34-infonce-200ep-seed0-preset=modern-temperature=0.1-views=mild-warmupepochs=5.0",
    ),
    (
        "steal",
        "--dataset cifar10 --datasetsteal svhn --epochs 100 --arch resnet34 --losstype mse --num_queries 9000",
        "stolen-svhn-resnet34-mse-9000q-100ep-seed0",
    ),
    ("steal", "--attack rda --n-views 5", "stolen-cifar10-resnet18-rda-25000q-100ep-seed0-attack=rda-nviews=5"),
    (
        "steal",
        "--attack cont-steal --num_queries 500 --seed 2",
        "stolen-cifar10-resnet18-contsteal-500q-100ep-seed2-attack=cont_steal",
    ),
    (
        "steal",
        "--attack stolenencoder --lambda-aug 1 --distance l1",
        "stolen-cifar10-resnet34-stolenencoder-9000q-100ep-seed0-attack=stolenencoder-distance=l1-lambdaaug=1.0",
    ),
    (
        "steal",
        "--attack conventional --lr 0.01",
        "stolen-cifar10-resnet18-mse-9000q-100ep-seed0-attack=conventional-lr=0.01",
    ),
    (
        "steal",
        "--losstype infonce --temperature 0.1 --n-views 2 --defence True",
        "stolen-cifar10-resnet34-infonce-9000q-100ep-seed0-defence=poisoning-nviews=2-temperature=0.1",
    ),
    (
        "steal",
        "--losstype mse --defence noise,rounding --sigma 1.5 --mu 0 --decimals 2 --consistent-noise --secret 4",
        "stolen-cifar10-resnet34-mse-9000q-100ep-seed0-consistentnoise=True-decimals=2-defence=noise_rounding-mu=0.0-secret=4-sigma=1.5",
    ),
    (
        "steal",
        "--losstype mse --defence buckets --bucket-beta 4 --max-coverage 100 --entropy",
        "stolen-cifar10-resnet34-mse-9000q-100ep-seed0-bucketbeta=4.0-defence=buckets_entropy-entropy=True-maxcoverage=100.0",
    ),
    (
        "steal",
        "--losstype mse --sybils 4 --repeat 2 --restore --query-order random --force",
        "stolen-cifar10-resnet34-mse-9000q-100ep-seed0-force=True-queryorder=random-repeat=2-restore=True-sybils=4",
    ),
    (
        "steal",
        "--losstype symmetrized --out_dim 64 --victimhead --watermark True",
        "stolen-cifar10-resnet34-symmetrized-9000q-100ep-seed0-outdim=64-victimhead=True-watermark=True",
    ),
    (
        "steal",
        "--losstype mse --useaug --copy-views 2 --stolenhead True -b 32 --flat-epochs 1 --optimizer sgd --momentum 0.8",
        "stolen-cifar10-resnet34-mse-9000q-100ep-seed0-batchsize=32-copyviews=2-flatepochs=1-momentum=0.8-optimizer=sgd-stolenhead=True-useaug=True",
    ),
    (
        "stealhead",
        "--losstype infonce --num_queries 9000",
        "stolen-stealhead-cifar10-resnet34-infonce-infonce-9000q-100ep-seed0",
    ),
    (
        "stealhead",
        "--losstype mse --losshead softnn --temperaturesn 5 --head-queries 100 --epochshead 3 --lrhead 0.01 -a resnet18",
        "stolen-stealhead-cifar10-resnet18-softnn-mse-9000q-100ep-seed0-epochshead=3-headqueries=100-lrhead=0.01-temperaturesn=5.0",
    ),
    (
        "steallabels",
        "--mode knockoff --victimtype supervised --dataset svhn",
        "stolen-steallabels-svhn-cifar10-resnet18-knockoff-9000q-100ep-seed0-mode=knockoff-victimtype=supervised",
    ),
    (
        "steallabels",
        "--dataset-test mnist --modeloutput logits --num-test 500",
        "stolen-steallabels-mnist-cifar10-resnet18-direct-9000q-100ep-seed0-modeloutput=logits-numtest=500",
    ),
    (
        "linear_eval",
        "--dataset cifar10 --datasetsteal svhn --dataset-test stl10 --losstype mse --num_queries 9000",
        "linear-stl10-seed0",
    ),
    (
        "linear_eval",
        "--modeltype victim --dataset-test shapes --arch resnet10w32 -n 1000 --num-test 1000 --save True",
        "linear-shapes-seed0-numlabeled=1000-numtest=1000",
    ),
    (
        "linear_eval",
        "--modeltype random --probe mlp --probe-epochs 5 -b 8 --lr 0.1 --seed 1",
        "linear-cifar10-seed1-batchsize=8-lr=0.1-probe=mlp-probeepochs=5",
    ),
    ("linear_eval", "--fidelity --independent random", "linear-cifar10-seed0-fidelity=True"),
    ("linear_eval", "--finetune -n 500", "linear-cifar10-seed0-finetune=True-numlabeled=500"),
    (
        "legitimate",
        "--dataset cifar10 --arch resnet34 --defence noise --sigma 0.5",
        "legitimate-cifar10-9000q-seed0-defence=noise",
    ),
    (
        "legitimate",
        "--defence buckets,transform --bucket-beta 4 --num_queries 400 --lrhead 0.01 --epochs 3 --dataset-test mnist",
        "legitimate-mnist-400q-seed0-bucketbeta=4.0-defence=buckets_transform-epochs=3-lrhead=0.01",
    ),
    (
        "stealsimsiam",
        "--pretrained v.pth --datasetsteal imagenet --losstype infonce --num_queries 100000 --temperature 0.1 --lars -b 512",
        "stolen_simsiam-imagenet-resnet50-infonce-100000q-100ep-seed0-batchsize=512-lars=True-temperature=0.1",
    ),
    (
        "stealsimsiam",
        "--pretrained v.pth --datasetsteal fmnist --losstype softnn --epochssteal 9 --useaug False --query-view center --size 96 --wd 0.1",
        "stolen_simsiam-fashionmnist-resnet50-softnn-50000q-9ep-seed0-queryview=center-size=96-useaug=False-weightdecay=0.1",
    ),
    (
        "linsimsiam",
        "--batch-size 256 --lars --lr 1.0 --datasetsteal imagenet --num_queries 250000 --losstype infonce --dataset cifar10 --modeltype stolen --workers 8",
        "linear_simsiam-cifar10-seed0-lars=True-lr=1.0",
    ),
    (
        "linsimsiam",
        "--pretrained v.pth --dataset svhn --augment --epochs 5 --size 64 --start-epoch 2",
        "linear_simsiam-svhn-seed0-augment=True-epochs=5-size=64-startepoch=2",
    ),
    (
        "detect",
        "--dataset cifar10 --victim v.pth --streams 30 --stream-length 300 --detection-bits 8 --dataset-users svhn",
        "detect-cifar10-30-300-seed0-datasetusers=svhn-detectionbits=8",
    ),
    (
        "verify",
        "--method watermark --victim v.pth --suspect a.pth b.pth --independent c.pth --level 0.01 --num-test 500",
        "verify-watermark-seed0-level=0.01-numtest=500-be0dc5e2",
    ),
    (
        "verify",
        "--method dataset-inference --victim v.pth --suspect a.pth --components 5 --num-train 400 --seed 2",
        "verify-dataset_inference-seed2-components=5-numtrain=400-ae6d5d0d",
    ),
]


@pytest.mark.parametrize(("script", "line", "name"), NAMES)
def test_runs_are_named_as_ever(script, line, name):
    assert run_name(importlib.import_module(script).parse(line.split())) == name


def test_both_spellings_of_a_flag_give_one_name():
    steal = importlib.import_module("steal")
    dashes = "--num-queries 50 --n-views 2 --batch-size 8 --query-order random"
    names = {run_name(steal.parse(line.split())) for line in (dashes, dashes.replace("-", "_").replace("__", "--"))}
    assert len(names) == 1
