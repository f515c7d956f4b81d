"""Cats and dogs from a layout of 64x64 (pet, background, border) and one of 37 breeds: python train.py pets_layout

Hardware: one GPU. TFDS downloads the data, 800 MB, the first time. 3,680 photographs are few: expect it to overfit.
"""

from dit.config import Config, Data, Model, Objective, Optim, Train

config = Config(
    name="pets_layout",
    model=Model(hidden_size=384, depth=12, num_heads=6, patch_size=4),
    objective=Objective(schedule="cosine", label_dropout=0.1, mask_dropout=0.2),
    data=Data(name="oxford_iiit_pet", image_size=64, channels=3, num_classes=37, mask_classes=3, flip=True),
    optim=Optim(learning_rate=3e-4, warmup_steps=1000, grad_clip=1.0, ema_decay=0.9999),
    train=Train(steps=50_000, batch_size=256, dtype="bfloat16", sample_every=5000, checkpoint_every=5000, keep_every=0),
)
