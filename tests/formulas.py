"""The formula of every loss, written out in loops, as slow and plain as can be: what test_loss.py compares with."""

import torch


def slow_nt_xent(rows, images, temperature):
    total = 0.0
    for i in range(len(rows)):
        cosine = [torch.dot(rows[i], row) / rows[i].norm() / row.norm() for row in rows]
        denominator = sum(torch.exp(cosine[j] / temperature) for j in range(len(rows)) if j != i)
        positives = [p for p in range(len(rows)) if p != i and p % images == i % images]
        terms = [-torch.log(torch.exp(cosine[p] / temperature) / denominator) for p in positives]
        total = total + sum(terms) / len(terms)
    return total / len(rows)


def slow_infonce(copy, victim, temperature=0.07, views=1):
    return slow_nt_xent(torch.cat([copy, victim]), len(copy) // views, temperature)


def slow_mse(copy, victim):
    return sum((a - b) ** 2 for a, b in zip(copy.flatten(), victim.flatten(), strict=True)) / copy.numel()


def slow_softce(copy, victim):
    total = 0.0
    for a, b in zip(copy, victim, strict=True):
        target = torch.exp(b) / torch.exp(b).sum()
        total = total - (target * torch.log(torch.exp(a) / torch.exp(a).sum())).sum()
    return total / len(copy)


def slow_wasserstein(copy, victim):
    total = 0.0
    for a, b in zip(copy, victim, strict=True):
        for c in range(len(a)):
            total = total + torch.abs(a[: c + 1].sum() / (a.sum() + 1e-14) - b[: c + 1].sum() / (b.sum() + 1e-14))
    return total / len(copy)


def slow_softnn(copy, victim, temperature=100.0, views=1):
    rows = torch.cat([copy, victim])
    images, total = int(len(rows) / 2 / views), 0.0
    for i in range(len(rows)):
        near = [torch.exp(-((rows[i] - row) ** 2).sum() / temperature) for row in rows]
        everyone = sum(near[j] for j in range(len(rows)) if j != i)
        positive = sum(near[j] for j in range(len(rows)) if j != i and j % images == i % images)
        total = total - torch.log(positive / everyone)
    return total / len(rows)


def slow_supcon_training(rows, labels, temperature=0.07):
    labels = [int(label) for label in labels] * (len(rows) // len(labels))
    total = 0.0
    for i in range(len(rows)):
        cosine = [torch.dot(rows[i], row) / rows[i].norm() / row.norm() for row in rows]
        denominator = sum(torch.exp(cosine[j] / temperature) for j in range(len(rows)) if j != i)
        positives = [p for p in range(len(rows)) if p != i and labels[p] == labels[i]]
        terms = [torch.log(torch.exp(cosine[p] / temperature) / denominator) for p in positives]
        total = total - temperature / 0.07 * sum(terms) / len(terms)
    return total / len(rows)


def slow_supcon(copy, victim, labels, temperature=0.07):
    return slow_supcon_training(torch.cat([copy, victim]), labels, temperature)


def slow_cosine(copy, victim):
    return sum(1 - torch.dot(a, b) / a.norm() / b.norm() for a, b in zip(copy, victim, strict=True)) / len(copy)


def slow_bce(copy, victim):
    total = 0.0
    for a, b in zip(copy.flatten(), victim.flatten(), strict=True):
        active, probability = float(b > 0), 1 / (1 + torch.exp(-a))
        total = total - active * torch.log(probability) - (1 - active) * torch.log(1 - probability)
    return total / copy.numel()


def slow_barlow(a, b):
    def standard(column):
        mean = sum(column) / len(column)
        return (column - mean) / torch.sqrt(sum((column - mean) ** 2) / len(column) + 1e-5)

    total = 0.0
    for c in range(a.shape[1]):
        for d in range(a.shape[1]):
            correlation = torch.dot(standard(a[:, c]), standard(b[:, d])) / len(a)
            total = total + ((correlation - 1) ** 2 if c == d else 0.0051 * correlation**2)
    return total


def slow_barlow_training(rows, views=2):
    each = [rows[i * len(rows) // views : (i + 1) * len(rows) // views] for i in range(views)]
    pairs = [(v, w) for v in range(views) for w in range(v)]
    return sum(slow_barlow(each[v], each[w]) for v, w in pairs) / len(pairs)


def slow_mse_between_views(rows, views=2):
    each = [rows[i * len(rows) // views : (i + 1) * len(rows) // views] for i in range(views)]
    pairs = [(v, w) for v in range(views) for w in range(v)]
    return sum(slow_mse(each[v], each[w]) for v, w in pairs) / len(pairs)


def slow_symmetrized(copy, victim, views=2):
    images, terms = len(copy) // views, []
    for v in range(views):
        for w in range(views):
            for i in range(images if v != w else 0):
                p, z = copy[v * images + i], victim[w * images + i]
                terms.append(-torch.dot(p, z) / p.norm() / z.norm())
    return sum(terms) / len(terms)


def slow_byol(predictions, targets, views=2):
    images, total = len(predictions) // views, 0.0
    for v in range(views):
        for w in range(views):
            for i in range(images if v != w else 0):
                q, z = predictions[v * images + i], targets[w * images + i]
                total = total + ((q / q.norm() - z / z.norm()) ** 2).sum()
    return 2 * total / images / (views * (views - 1))


def slow_moco(queries, keys, temperature=0.1, views=2):
    queries, keys, images, total = unit(queries), unit(keys), len(queries), 0.0
    for i in range(images):
        negative = sum(torch.exp(torch.dot(queries[i], row) / temperature) for row in keys[(views - 1) * images :])
        for w in range(views - 1):
            matched = torch.exp(torch.dot(queries[i], keys[w * images + i]) / temperature)
            total = total - torch.log(matched / (matched + negative))
    return total / images / (views - 1)


def unit(rows):
    return torch.stack([row / row.norm() for row in rows])


def slow_contrast(copy, victim, temperature, views, matched_counts, victim_anchors=False):
    """By products of the rows as they are."""
    images, total = len(copy) // views, 0.0
    for row in range(len(copy)):
        view, i = divmod(row, images)
        denominator = 0.0
        for j in [j + view * images for j in range(images) if j != i]:
            cross = torch.dot(victim[row], copy[j]) if victim_anchors else torch.dot(copy[row], victim[j])
            denominator = denominator + torch.exp(cross / temperature)
            denominator = denominator + torch.exp(torch.dot(copy[row], copy[j]) / temperature)
        matched = torch.exp(torch.dot(copy[row], victim[row]) / temperature)
        total = total - torch.log(matched / (denominator + matched_counts * matched))
    return total / len(copy)


def slow_contsteal(copy, victim, temperature=0.5, views=1):
    return slow_nt_xent(torch.cat([copy, victim]), len(copy) // views, temperature)


def slow_contsteal_paper(copy, victim, temperature=0.5, views=1):
    return slow_contrast(unit(copy), unit(victim), temperature, views, matched_counts=1)


def slow_contsteal_rda(copy, victim, temperature=0.07, views=1):
    return slow_contrast(unit(copy), unit(victim), temperature, views, matched_counts=0, victim_anchors=True)


def slow_rda(copy, victim, temperature=0.07, views=1):
    copy = unit(copy)
    total = slow_contrast(copy, victim, temperature, views, matched_counts=0)
    for s, p in zip(copy, victim, strict=True):
        angle = torch.dot(s, p) / p.norm() + 1
        total = total - torch.log((angle + 1e-6) / (((s - p) ** 2).sum() + 1e-6)) / len(copy)
    return total


def slow_stolenencoder(copy, victim, views=1, lambda_aug=9.0, distance="l2"):
    copy, victim = unit(copy), unit(victim)

    def between(a, b):
        if distance == "l2":
            return torch.sqrt(((a - b) ** 2).sum())
        return sum(abs(a - b)) if distance == "l1" else 1 - torch.dot(a, b) / a.norm() / b.norm()

    each = [between(a, b) for a, b in zip(copy, victim, strict=True)]
    images = len(copy) // views
    augmented = sum(each[images:]) / (views - 1) if views > 1 else 0.0
    return sum(each[:images]) + lambda_aug * augmented


SLOW = {
    "infonce": slow_infonce,
    "mse": slow_mse,
    "softce": slow_softce,
    "wasserstein": slow_wasserstein,
    "softnn": slow_softnn,
    "supcon": slow_supcon,
    "symmetrized": slow_symmetrized,
    "barlow": slow_barlow,
    "cosine": slow_cosine,
    "bce": slow_bce,
    "contsteal": slow_contsteal,
    "contsteal-paper": slow_contsteal_paper,
    "contsteal-rda": slow_contsteal_rda,
    "stolenencoder": slow_stolenencoder,
    "rda": slow_rda,
}
SLOW_TRAINING = {
    "infonce": lambda rows, views=2, temperature=0.07: slow_nt_xent(rows, len(rows) // views, temperature),
    "softnn": lambda rows, views=2, temperature=100.0: slow_softnn(rows[:0], rows, temperature, views / 2),
    "supcon": slow_supcon_training,
    "barlow": slow_barlow_training,
    "simsiam": slow_symmetrized,
    "byol": slow_byol,
    "moco": slow_moco,
    "supervised": lambda logits, labels: slow_labels(logits, torch.eye(logits.shape[1], dtype=logits.dtype)[labels]),
}


def slow_labels(logits, target):
    """Cross-entropy of several rows of each image with its row of the target."""
    target = target.repeat(len(logits) // len(target), 1)
    each = [-(t * torch.log(torch.exp(a) / torch.exp(a).sum())).sum() for a, t in zip(logits, target, strict=True)]
    return sum(each) / len(each)
