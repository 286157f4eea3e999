# What torchvision's state_dicts hold, written down from torchvision's code: name → shape.
#
# Not derived from the networks beside this file: if the two disagree, the conversion fails.


def conv(name, o, i, kernel=1, bias=False):
    yield f"{name}.weight", (o, i, kernel, kernel)
    if bias:
        yield f"{name}.bias", (o,)


def norm(name, c):
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{leaf}", (c,)
    yield f"{name}.num_batches_tracked", ()


def dense(name, o, i):
    yield f"{name}.weight", (o, i)
    yield f"{name}.bias", (o,)


def unit(name, o, i, kernel=1):  # Conv2dNormActivation
    yield from conv(f"{name}.0", o, i, kernel)
    yield from norm(f"{name}.1", o)


def resnet(blocks=(2, 2, 2, 2), bottleneck=False, width=64, classes=1000):
    yield from conv("conv1", width, 3, 7)
    yield from norm("bn1", width)
    c = width
    for stage, count in enumerate(blocks):
        f = width * 2**stage
        out = 4 * f if bottleneck else f
        for i in range(count):
            name = f"layer{stage + 1}.{i}"
            sizes = ((f, c, 1), (f, f, 3), (out, f, 1)) if bottleneck else ((f, c, 3), (f, f, 3))
            for k, size in enumerate(sizes, 1):
                yield from conv(f"{name}.conv{k}", *size)
                yield from norm(f"{name}.bn{k}", size[0])
            if c != out:
                yield from unit(f"{name}.downsample", out, c)
            c = out
    yield from dense("fc", classes, c)


def mobilenet_v2(stages, stem=32, head=1280, classes=1000):
    yield from unit("features.0", stem, 3, 3)
    c, n = stem, 1
    for expansion, out, count, _ in stages:
        for _ in range(count):
            name, inner = f"features.{n}.conv", expansion * c
            parts = iter(range(4))
            if expansion > 1:
                yield from unit(f"{name}.{next(parts)}", inner, c)
            yield from unit(f"{name}.{next(parts)}", inner, 1, 3)
            yield from conv(f"{name}.{next(parts)}", out, inner)
            yield from norm(f"{name}.{next(parts)}", out)
            c, n = out, n + 1
    yield from unit(f"features.{n}", head, c)
    yield from dense("classifier.1", classes, head)


def efficientnet_b0(stages, stem=32, head=1280, classes=1000):
    yield from unit("features.0", stem, 3, 3)
    c = stem
    for stage, (expansion, kernel, _, out, count) in enumerate(stages, 1):
        for i in range(count):
            name, inner, squeezed = f"features.{stage}.{i}.block", expansion * c, max(1, c // 4)
            parts = iter(range(4))
            if expansion > 1:
                yield from unit(f"{name}.{next(parts)}", inner, c)
            yield from unit(f"{name}.{next(parts)}", inner, 1, kernel)
            gate = f"{name}.{next(parts)}"
            yield from conv(f"{gate}.fc1", squeezed, inner, bias=True)
            yield from conv(f"{gate}.fc2", inner, squeezed, bias=True)
            yield from unit(f"{name}.{next(parts)}", out, inner)
            c = out
    yield from unit(f"features.{len(stages) + 1}", head, c)
    yield from dense("classifier.1", classes, head)


def densenet121(blocks=(6, 12, 24, 16), width=64, growth=32, classes=1000):
    yield from conv("features.conv0", width, 3, 7)
    yield from norm("features.norm0", width)
    c = width
    for b, count in enumerate(blocks, 1):
        for i in range(1, count + 1):
            name = f"features.denseblock{b}.denselayer{i}"
            yield from norm(f"{name}.norm1", c)
            yield from conv(f"{name}.conv1", 4 * growth, c)
            yield from norm(f"{name}.norm2", 4 * growth)
            yield from conv(f"{name}.conv2", growth, 4 * growth, 3)
            c += growth
        if b < len(blocks):
            yield from norm(f"features.transition{b}.norm", c)
            yield from conv(f"features.transition{b}.conv", c // 2, c)
            c //= 2
    yield from norm("features.norm5", c)
    yield from dense("classifier", classes, c)
