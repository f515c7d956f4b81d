"""A small DiT on CIFAR-10, to see everything work on a CPU: python train.py cifar10_tiny

Hardware: two CPU cores, 3.5 minutes. Expect colours that go with the class, and no objects yet.
"""

from dit.config import Config, Data, Model, Objective, Optim, Train

config = Config(
    name="cifar10_tiny",
    model=Model(hidden_size=128, depth=4, num_heads=4, patch_size=4),
    objective=Objective(schedule="cosine"),
    data=Data(name="cifar10", image_size=32, channels=3, num_classes=10, flip=True),
    optim=Optim(learning_rate=1e-3, warmup_steps=50, schedule="cosine", ema_decay=0.995),
    train=Train(
        steps=1000,
        batch_size=32,
        dtype="float32",
        log_every=20,
        sample_every=500,
        checkpoint_every=500,
        keep_every=0,
    ),
)
