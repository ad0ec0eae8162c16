package dev.gemmaedge.app;

import android.graphics.BitmapFactory;
import android.view.LayoutInflater;
import android.view.View;
import android.view.ViewGroup;
import android.widget.BaseAdapter;
import android.widget.ImageView;
import android.widget.LinearLayout;
import android.widget.TextView;

import java.util.ArrayList;
import java.util.List;

import dev.gemmaedge.plain.Turn;

/** The turns as rows of a list. */
final class TurnList extends BaseAdapter {
    private final ChatActivity screen;
    private List<Turn> turns = new ArrayList<Turn>();
    private String waiting = "";

    TurnList(ChatActivity screen) {
        this.screen = screen;
    }

    /** @param waiting shown where an answer will be */
    void show(List<Turn> turns, String waiting) {
        this.turns = turns;
        this.waiting = waiting;
        notifyDataSetChanged();
    }

    @Override
    public int getCount() {
        return turns.size();
    }

    @Override
    public Turn getItem(int position) {
        return turns.get(position);
    }

    @Override
    public long getItemId(int position) {
        return position;
    }

    @Override
    public int getViewTypeCount() {
        return 2;
    }

    @Override
    public int getItemViewType(int position) {
        return turns.get(position).user ? 0 : 1;
    }

    @Override
    public View getView(int position, View old, ViewGroup parent) {
        final Turn turn = turns.get(position);
        View row = old;
        if (row == null)
            row = LayoutInflater.from(screen).inflate(turn.user ? R.layout.turn_user : R.layout.turn_model, parent, false);
        TextView text = (TextView) row.findViewById(R.id.text);
        boolean empty = turn.text.isEmpty() && !turn.user;
        text.setText(empty && position == turns.size() - 1 && !waiting.isEmpty() ? waiting + "…" : turn.text);
        text.setVisibility(turn.user && turn.text.isEmpty() ? View.GONE : View.VISIBLE);
        String who = screen.getString(turn.user ? R.string.you : R.string.model_said);
        text.setContentDescription(who + ": " + text.getText());
        if (turn.user) {
            showPictures((LinearLayout) row.findViewById(R.id.pictures), turn);
        } else {
            TextView note = (TextView) row.findViewById(R.id.note);
            note.setText(turn.note);
            note.setVisibility(turn.note.isEmpty() ? View.GONE : View.VISIBLE);
        }
        text.setOnLongClickListener(new View.OnLongClickListener() {
            @Override
            public boolean onLongClick(View view) {
                screen.showTurnMenu(turn);
                return true;
            }
        });
        return row;
    }

    private void showPictures(LinearLayout strip, Turn turn) {
        String wanted = turn.images + "" + turn.sounds;
        if (wanted.equals(strip.getTag())) return; // decoded before: rows are shown again with every token
        strip.setTag(wanted);
        strip.removeAllViews();
        for (String path : turn.images) {
            BitmapFactory.Options small = new BitmapFactory.Options();
            small.inSampleSize = 4;
            ImageView picture = new ImageView(screen);
            picture.setImageBitmap(BitmapFactory.decodeFile(path, small));
            picture.setContentDescription(screen.getString(R.string.photo));
            picture.setScaleType(ImageView.ScaleType.CENTER_CROP);
            strip.addView(picture, screen.pixels(120), screen.pixels(120));
        }
        for (int i = 0; i < turn.sounds.size(); i++) {
            TextView sound = new TextView(screen, null, 0, R.style.Small);
            sound.setText(R.string.sound);
            strip.addView(sound);
        }
    }
}
