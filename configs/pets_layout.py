"""Cats and dogs of 64x64 from a breed and a layout of 3 classes: python train.py pets_layout

The layout's classes are pet, background and border, the breeds are 37. Hardware: one GPU. TFDS
downloads the data, 800 MB, the first time. 3,680 photographs are few: expect it to overfit.
"""

from dit.config import PRESETS, Config, Data, Model, Objective, Optim, Train

config = Config(
    name="pets_layout",
    model=Model(**PRESETS["DiT-S/4"], remat="dots"),
    objective=Objective(schedule="cosine", label_dropout=0.1, mask_dropout=0.2),
    data=Data(
        name="oxford_iiit_pet",
        image_size=64,
        channels=3,
        num_classes=37,
        mask_classes=3,
        flip=True,
    ),
    optim=Optim(learning_rate=3e-4, warmup_steps=1000, grad_clip=1.0, ema_decay=0.9999),
    train=Train(
        steps=50_000,
        batch_size=256,
        dtype="bfloat16",
        sample_every=5000,
        checkpoint_every=5000,
        keep_every=0,
    ),
)
