"""A small DiT on CIFAR-10, for a CPU: python train.py cifar10_tiny

Hardware: two CPU cores, an hour. Expect horses, ships and trucks: a small classifier finds 84 % of
1,000 samples of guidance 2 in the class asked for, at a Frechet distance of 3.8 in its features, as
`python benchmarks/cifar10.py runs/cifar10_tiny --guidance 2` prints them.
"""

from dit.config import Config, Data, Model, Objective, Optim, Train

config = Config(
    name="cifar10_tiny",
    model=Model(hidden_size=128, depth=4, num_heads=4, patch_size=4),
    # JiT's times on pixels, of more noise; its t runs the other way, so that its mean is -0.8
    objective=Objective(name="flow", prediction="x0", time_mean=0.8, time_std=0.8),
    data=Data(name="cifar10", image_size=32, channels=3, num_classes=10, flip=True),
    optim=Optim(
        name="muon", learning_rate=3e-3, warmup_steps=100, schedule="cosine", ema_decay=0.998
    ),
    train=Train(
        steps=14_000,
        batch_size=64,
        dtype="float32",
        log_every=50,
        sample_every=2000,
        checkpoint_every=1000,
        keep_every=2000,
        sample_steps=25,
    ),
)
