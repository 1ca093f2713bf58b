"""Which of many suspects are stolen: `verify.py --suspects`.

rank       the whole of it                             suspects   where they are, what is known of them
scores     an encoder's closeness to a victim          probe_images   the images on which scores are taken
shadows    encoders trained as the victim was          standing   a suspect among independent encoders: z, p, verdict
report     the table, lines and row                    disguises  how thieves hide copies
"""
