"""The digits with a layout, a coarse mask of where the ink goes: python train.py digits_layout

Hardware: two CPU cores, minutes. To draw inside a mask of 8x8 pixels:
`python sample.py runs/digits_layout --mask mask.png --classes 3 --out x.png`
"""

from dit.config import Config, Data, Model, Objective, Optim, Train

config = Config(
    name="digits_layout",
    model=Model(hidden_size=128, depth=4, num_heads=4, patch_size=2),
    objective=Objective(
        schedule="cosine", min_snr_gamma=5.0, label_dropout=0.05, mask_dropout=0.15
    ),
    data=Data(name="digits", image_size=8, channels=1, num_classes=10, mask_classes=2),
    optim=Optim(learning_rate=2e-3, warmup_steps=100, schedule="cosine", ema_decay=0.998),
    train=Train(
        steps=2000,
        batch_size=64,
        dtype="float32",
        log_every=50,
        sample_every=1000,
        checkpoint_every=1000,
        keep_every=0,
        sampler="ddpm",
        sample_steps=100,
    ),
)
